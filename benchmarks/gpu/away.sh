# Runs `make gpu` on a machine to which the folder .gpu was copied, from the folder above it:
#     OUT=results STAGES=a BUDGET=480 bash .gpu/run.sh
# `python -m benchmarks.gpu.carry --tree` writes it. Few files come back: the lines as they come, at the end the logs in
# one archive, the ceilings and gates (kept.json) and the caches. Copy kept.json and caches.tar.xz into .gpu before the
# next call.
set -u
carried=$PWD/.gpu results=/tmp/fastmoco-results
mkdir -p /tmp/fastmoco "$results" "${OUT:?folder of the results}"
back=$(cd "$OUT" && pwd)
python3 -c "import sys, tarfile; tarfile.open(sys.argv[1]).extractall('/tmp/fastmoco', filter='data')" "$carried/tree.tar.xz" || exit
ln -sfn "$carried" /tmp/fastmoco/.gpu
cd /tmp/fastmoco || exit
cp -f .gpu/_native.abi3.so kernels/fastmoco_kernels/cut_views/ 2>/dev/null  # else it is built there
cp -n .gpu/kept.json "$results/" 2>/dev/null

# What is known comes back even if this script is ended.
(while sleep 4; do cp -f "$results/gpu.jsonl" "$back/" 2>/dev/null; done) &
keeper=$!
nvidia-smi 2>/dev/null | head -15
FASTMOCO_COMMIT=@COMMIT@ OUT=$results make gpu
code=$?
kill "$keeper"
for name in gpu.jsonl kept.json caches.tar.xz; do cp -f "$results/$name" "$back/" 2>/dev/null; done
(cd "$results" && tar -czf "$back/logs.tgz" -- *.log)
exit "$code"
