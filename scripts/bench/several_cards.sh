#!/usr/bin/env bash
# Tests and measures instances over several GPUs at the published size with random weights, and saves the results.
#
#   several_cards.sh FOLDER [SECONDS] [COMMIT]
#
# Uses 2, 4 or 8 GPUs, or DEVICES (cuda:0,cuda:1 for example; cpu,cpu runs the ranks over gloo on the tiny checkpoint).
# Starts no part after SECONDS (480). A part that fails does not stop the others; the exit code is then 1. PYTHON names
# the interpreter. The parts that need a server run where a Triton server is installed.
set -uo pipefail

(($# >= 1)) || {
  sed -n '2,8s/^# \{0,1\}//p' "$0"
  exit 2
}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
repository=$(cd "$here/../.." && pwd)
mkdir -p "$1"
folder=$(cd "$1" && pwd) budget=${2:-480} commit=${3:-}
python=${PYTHON:-python3}
failed=0
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export PYTHONPATH="$repository/python_backends:$repository/client:$repository/scripts${PYTHONPATH:+:$PYTHONPATH}"

part() {
  local name=$1 begin=$SECONDS
  shift
  if ((SECONDS >= budget)); then
    echo "skipped after $SECONDS s: $name" >&2
    failed=1
    return
  fi
  "$@" || {
    echo "failed: $name" >&2
    failed=1
  }
  echo "$name took $((SECONDS - begin)) s, $SECONDS s in all" >&2
}

bench() {
  local name=$1
  shift
  part "$name" "$python" "$here/run" "$@" --save --folder "$folder" --commit "$commit" --checkpoint "$checkpoint"
}

pytest() {
  local log=$1
  shift
  "$python" -m pytest -q -p no:cacheprovider -m "full or not full" "$@" >"$folder/$log.log" 2>&1
}

devices=${DEVICES:-$("$python" -c 'import torch; print(",".join(f"cuda:{i}" for i in range(torch.cuda.device_count())))')}
IFS=, read -ra each <<<"$devices"
count=${#each[@]}
if ((count < 2)); then
  echo "error: DEVICES is '$devices'; allowed: 2 devices or more, with commas between" >&2
  exit 2
fi
if [[ $devices == cpu* ]]; then
  checkpoint=$repository/checkpoints/tiny
  bench "parallel" parallel --brief --device "$devices" --parallel "cfg=2;ulysses=2;ring=2;tp=2"
  exit "$failed"
fi

checkpoint=$scratch/full
"$python" "$repository/scripts/make_tiny_checkpoint.py" --preset full --weights none "$checkpoint" || exit 1
two=${each[0]},${each[1]}
served=$("$python" -c "from glm_image.supervisor.installation import find_installation; find_installation(); print(1)" 2>/dev/null)
bench "two cards" parallel --device "$two" --profile
if ((count >= 4)); then
  four=$(IFS=,; echo "${each[*]:0:4}")
  bench "four cards" parallel --label x4 --device "$four" --parallel "cfg=2,ulysses=2;ulysses=4;ring=4;cfg=2,tp=2;tp=4"
fi
if ((count >= 8)); then
  bench "eight cards" parallel --label x8 --device "$devices" --stages dit --parallel "cfg=2,ulysses=4;ulysses=8"
fi
if [[ $served ]]; then
  bench "two DiT instances" cards instances --dummy --devices "$two" --size 1024x1024 --steps 10
  bench "a stage on each card" cards pipeline --dummy --devices "$two" --size 1024x1024 --steps 50
fi
part "kernels" pytest kernels "$repository/tests/kernels"
part "ranks" pytest ranks -rA "$repository/tests/parity/test_gpu_ranks.py"
exit "$failed"
