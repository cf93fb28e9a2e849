"""What the scripts of BYOL Mammo share. Scripts import these modules, which import no script."""
