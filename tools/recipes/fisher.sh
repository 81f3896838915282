#!/usr/bin/env bash
# Fisher English (LDC2004S13, LDC2004T19, and part 2: LDC2005S13, LDC2005T19) as shards.
#
#   tools/recipes/fisher.sh /corpora/fisher/trans /corpora/fisher/audio shards/fisher
#
# The first folder has the transcripts (fe_03_*.txt at any depth), the second the recordings (*.sph). Each
# side of a call is a channel of its own. LDC gives no split: calls whose number ends in 00 become dev, in
# 50 test, and the others train. Turns with words that were not understood, `(( ))`, are dropped; marks of
# noises, `[laughter]`, are taken out. Sphere files that are compressed by shorten need
# sph2pipe: COMMAND="sph2pipe -f wav {}". Settings: see steps.sh.

source "$(dirname "${BASH_SOURCE[0]}")/steps.sh"
usage_unless 3 $# "$0"
transcripts=$(cd "$1" && pwd) audio=$2 out=$3

lists=$out/transcripts
mkdir -p "$lists"/{train,dev,test}
while IFS= read -r -d '' file; do
    case $file in
        *00.txt) split=dev ;;
        *50.txt) split=test ;;
        *) split=train ;;
    esac
    ln -sfn "$file" "$lists/$split/$(basename "$file")"
done < <(find -L "$transcripts" -name 'fe_03_*.txt' -print0)

allowed=()
if [ -n "${COMMAND:-}" ]; then
    allowed=(--allow-commands --command-cache "$out/decoded")
fi
for split in train dev test; do
    source="fisher:$lists/$split,audio=$audio${COMMAND:+,command=$COMMAND}"
    build "$out/$split" --source "$source" "${allowed[@]}" --name "$split" \
        --normalise strip-brackets,lowercase --drop-text '\(\(' --min-seconds 0.5 --max-seconds 30
done
finish configs/recipes/fisher.yaml "$out/train" "$out/dev" "$out/test"
