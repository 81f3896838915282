# What the recipes share; each of them sources this file. Settings from the environment:
#
#   PYTHON   python with speechllm installed (default: python)
#   OPTIONS  further options of tools/make_shards.py, e.g. "--num-workers 8 --shard-size 1GB"
#   TASKS    shards by an array job of so many tasks on SPEECHLLM_SITE, in place of this machine

set -euo pipefail
PYTHON=${PYTHON:-python}
OPTIONS=${OPTIONS:-}
TASKS=${TASKS:-}
TOOLS=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# Print the comment at the top of a recipe and leave, where the arguments are not as many as wanted.
usage_unless() { # WANTED GIVEN RECIPE
    [ "$1" = "$2" ] && return
    sed -n '2,/^$/s/^# \{0,1\}//p' "$3" >&2
    exit 2
}

# Make the shards of one split, or go on making them.
build() { # OUT MAKE_SHARDS_OPTION...
    local out=$1
    shift
    # shellcheck disable=SC2086  # OPTIONS is several words
    if [ -n "$TASKS" ]; then
        "$PYTHON" "$TOOLS/../cluster/submit.py" shard "$@" --out "$out" --tasks "$TASKS" $OPTIONS
    else
        echo "== $out"
        "$PYTHON" "$TOOLS/make_shards.py" "$@" --out "$out" $OPTIONS
    fi
}

# Are the splits whole, and does the first share nothing with the others? Then how to train.
finish() { # CONFIG TRAIN OTHER...
    local config=$1
    shift
    local check=("$PYTHON" "$TOOLS/check_shards.py" "$@")
    if [ -n "$TASKS" ]; then
        echo "When the jobs are done: $(printf ' %q' "${check[@]}")"
    else
        "${check[@]}" || [ $? = 1 ] # what it found, it has said
    fi
    local train=("$PYTHON" -m speechllm train "$config" "data.train=$1" "data.validation=${2:-SHARDS}")
    echo "Then: $(printf ' %q' "${train[@]}")"
}
