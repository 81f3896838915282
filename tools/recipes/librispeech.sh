#!/usr/bin/env bash
# LibriSpeech 960 h (https://www.openslr.org/12), unpacked, as shards.
#
#   tools/recipes/librispeech.sh /corpora/LibriSpeech shards/librispeech
#
# Makes train (all parts there are of train-*), dev-clean, dev-other, test-clean and test-other, keeps
# the FLAC files as they are and lowercases the texts. Settings: see steps.sh.

source "$(dirname "${BASH_SOURCE[0]}")/steps.sh"
usage_unless 2 $# "$0"
corpus=$1 out=$2

train=()
for part in "$corpus"/train-*; do
    [ -d "$part" ] && train+=(--source "librispeech:$part")
done
[ ${#train[@]} -gt 0 ] || { echo "$corpus: no train-* below it; give the folder that holds train-clean-100" >&2; exit 2; }

build "$out/train" "${train[@]}" --name train --normalise lowercase --max-seconds 30
splits=("$out/train")
for part in dev-clean dev-other test-clean test-other; do
    [ -d "$corpus/$part" ] || continue
    build "$out/$part" --source "librispeech:$corpus/$part" --name "$part" --normalise lowercase
    splits+=("$out/$part")
done
finish configs/recipes/librispeech960.yaml "${splits[@]}"
