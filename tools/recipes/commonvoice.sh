#!/usr/bin/env bash
# One language of Common Voice (https://commonvoice.mozilla.org), unpacked, as shards.
#
#   tools/recipes/commonvoice.sh /corpora/cv-corpus-22.0/cs shards/commonvoice_cs
#
# Makes train, dev and test of the release's own split, which shares no speakers; MP3 files are kept as
# they are. Texts that are empty or spoken impossibly fast are dropped. Settings: see steps.sh.

source "$(dirname "${BASH_SOURCE[0]}")/steps.sh"
usage_unless 2 $# "$0"
corpus=$1 out=$2

splits=()
for split in train dev test; do
    build "$out/$split" --source "commonvoice:$corpus,tsv=$split" --name "$split" \
        --min-seconds 0.5 --max-seconds 30 --max-chars-per-second 35
    splits+=("$out/$split")
done
finish configs/recipes/commonvoice.yaml "${splits[@]}"
