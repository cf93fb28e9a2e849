#!/usr/bin/env bash
# Recipes of pre-training against each other on a GPU, in five minutes (see study.py):
#
#     tests/gpu/study.sh OUT [IMAGES]      # IMAGES: what prepare_dataset.py wrote, or films that
#                                          # tests/lay_out_real.py knows; without it phantoms
#     tests/gpu/study.sh --dry_run OUT     # one arm on the CPU at tiny sizes
#
# IMAGENET=FILE adds its weights as a reference and each arm from them, ARMS=a,b chooses among study_arms.txt,
# BUDGET=300 are the seconds of all. After each arm the results of those so far stand in OUT: a run that is cut
# keeps what it has. All arms take the same steps. environment.sh tells what it runs with.
root=$(cd "$(dirname "$0")/../.." && pwd)
. "$root/tests/gpu/environment.sh"

phantoms="--studies 40 --height 896 --width 704 --spacing_mm 0.27"
sizes="--tile_size 128 --tile_stride 64 --view_size 128 --pixel_spacing_mm 0.27 --min_breast_ratio 0.6"
sizes+=" --backbone resnet18 --batch_size 256 --steps 300 --points 3 --seeds 0"
common="--precision auto"
arms=${ARMS:-plain,default,targets,vicreg}
if [ "${1-}" = --dry_run ]; then
    shift
    phantoms="--studies 8 --height 440 --width 350 --spacing_mm 0.68"
    sizes="--tile_size 96 --tile_stride 64 --view_size 32 --pixel_spacing_mm 0.68 --min_breast_ratio 0.3"
    sizes+=" --backbone resnet18_slim --batch_size 8 --steps 2 --points 1 --seeds 0 --bootstrap 100"
    sizes+=" --device cpu --num_workers 1"
    common="--precision fp32 --hidden_dim 64 --proj_dim 16"
    arms=${ARMS:-plain}
fi
out=${1:?name the folder of the results} images=${2-} left=${BUDGET:-300}
mkdir -p "$out"

if [ -z "$images" ]; then
    images=$scratch/images
    "$PYTHON" "$root/synthetic_mammograms.py" --output_dir "$scratch/archive" $phantoms \
        --lesion_share 1 --test_share 0.4
    "$PYTHON" "$root/prepare_dataset.py" --csv_path "$scratch/archive/breast-level_annotations.csv" \
        --findings_csv "$scratch/archive/finding_annotations.csv" \
        --images_root "$scratch/archive/images_png" --output_dir "$images"
elif [ -f "$images/boxes.csv" ]; then
    "$PYTHON" "$root/tests/lay_out_real.py" "$images" "$scratch/images"
    images=$scratch/images
fi > "$out/study.log" 2>&1

# NAME: FLAGS of study_arms.txt; each arm asked for that is there, again from ImageNet where that is given.
while IFS=: read -r name flags; do
    case ",$arms," in *",$name,"*) ;; *) continue ;; esac
    echo "$name: $flags $common"
    [ -z "${IMAGENET-}" ] || echo "${name}_imagenet: $flags $common --weights $IMAGENET"
done < "$root/study_arms.txt" > "$out/arms.txt"
[ -s "$out/arms.txt" ] || { echo "study_arms.txt has none of the arms $arms"; exit 2; }

done_so_far=
while IFS=: read -r name _; do
    done_so_far+=${done_so_far:+,}$name
    if [ "$SECONDS" -ge "$left" ] || ! timeout $((left - SECONDS)) "$PYTHON" "$root/study.py" \
        --data_dir "$images" --output_dir "$scratch/study" --cache_dir "$scratch/cache" --arms_file "$out/arms.txt" \
        --arms "$done_so_far" $sizes ${IMAGENET:+--imagenet "$IMAGENET"} >> "$out/study.log" 2>&1 < /dev/null; then
        echo "$name: failed or out of time after $SECONDS s, see $out/study.log"
        exit 1
    fi
    cp "$scratch"/study/{study.csv,study.md,nuisance.csv,study.png} "$out"
    echo "$name: $SECONDS s"
done < "$out/arms.txt"
