# Runs on the instance, started by support/ec2/__main__.py. All output of a training goes to mnist/out.
#   bash train.sh start gpu|cpu FLAG...   installs what is missing, starts train.py in the background
#   bash train.sh log OFFSET              prints "running" or train.py's status, then the log from this byte
#   bash train.sh pack                    writes a tar archive of the results and their checksums
set -e
cd "$(dirname "$0")"
mkdir -p out
case $1 in
start)
    device=$2
    shift 2
    exec 9> lock
    flock -n 9 || { echo "a training is running: see its log with: ssh tail -f mnist/out/train.log" >&2; exit 75; }
    rm -rf new && mkdir new && tar -xzf - -C new
    rm -rf project && mv new project
    mv -n project/fetched/*.pth out 2> /dev/null || true  # states of an earlier instance; newer ones are kept
    if [ ! -e ready ]; then
        sudo apt-get -q -o DPkg::Lock::Timeout=300 update
        sudo apt-get -qy -o DPkg::Lock::Timeout=300 install python3-venv
        python3 -m venv --clear venv
        [ "$device" = gpu ] || venv/bin/pip install -q torch torchvision --index-url https://download.pytorch.org/whl/cpu
        venv/bin/pip install -q -r project/requirements.txt
        touch ready
    fi
    if [ "$device" = gpu ] && ! venv/bin/python -c 'import torch; torch.zeros(1).cuda()'; then
        echo "PyTorch cannot use the GPU of this instance" >&2
        exit 1
    fi
    rm -f status
    : > out/train.log
    # In a session of its own, which holds the lock until it ends.
    setsid bash -c 'cd out; s=0; ../venv/bin/python ../project/train.py "$@" > train.log 2>&1 || s=$?; echo $s > ../status' \
        train "$@" < /dev/null > /dev/null 2>&1 &
    ;;
log)
    if [ -e status ]; then cat status; elif flock -n lock true; then echo 1; else echo running; fi
    tail -c "+$(($2 + 1))" out/train.log
    ;;
pack)
    copy=$(mktemp -d)
    trap 'rm -rf "$copy"' EXIT
    for file in out/best_*.pth out/last_*.pth out/*.png out/train.log; do
        if [ -e "$file" ]; then cp "$file" "$copy"; fi  # checkpoints are replaced, never changed
    done
    cd "$copy"
    sha256sum -- * > SHA256SUMS
    tar -cf - -- *
    ;;
esac
