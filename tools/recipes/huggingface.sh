#!/usr/bin/env bash
# A Hugging Face dataset on disk (`save_to_disk`) with train, validation and test, as shards; How2 and
# its like come so.
#
#   tools/recipes/huggingface.sh /corpora/how2_hf shards/how2 audio text
#
# The last two are the columns of audio and text; other columns of texts and numbers are kept as fields.
# A split that the dataset calls dev or valid is found too. Settings: see steps.sh.

source "$(dirname "${BASH_SOURCE[0]}")/steps.sh"
usage_unless 4 $# "$0"
corpus=$1 out=$2 audio=$3 text=$4

splits=()
for wanted in "train" "validation dev val valid" "test"; do
    for name in $wanted; do
        [ -d "$corpus/$name" ] || continue
        split=${wanted%% *}
        build "$out/$split" --source "hf:$corpus,split=$name,audio=$audio,text=$text" \
            --name "$split" --max-seconds 30
        splits+=("$out/$split")
        break
    done
done
[ ${#splits[@]} -gt 1 ] || { echo "$corpus: needs train and validation (or dev) as folders; save a DatasetDict" >&2; exit 2; }
finish configs/recipes/how2.yaml "${splits[@]}"
