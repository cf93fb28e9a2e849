"""What the scripts of BYOL Mammo share. Scripts import these modules, which import no script."""

import pandas

# Names of files may hold any byte (os.fsdecode). The strings of pyarrow, pandas' choice where that is
# installed, refuse those by a UnicodeEncodeError.
pandas.set_option("mode.string_storage", "python")
