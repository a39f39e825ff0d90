# Run on the instance by support/ec2.py: installs once, starts train.py in tmux unless it runs, follows its log.
# Arguments: "gpu" where PyTorch has to find one, the minutes from the end to a shutdown or "", train.py's flags.
set -e
cd ~/mnist
gpu=$1 shutdown=$2
shift 2
if [ ! -e .venv/ready ]; then
    sudo apt-get -q -o DPkg::Lock::Timeout=300 update
    sudo apt-get -qy -o DPkg::Lock::Timeout=300 install python3-venv tmux
    image=/opt/pytorch/bin/python  # of an image that brings a PyTorch which suits its driver
    [ -x "$image" ] || image=
    "${image:-python3}" -m venv --clear .venv
    if [ "$image" ]; then  # it is in a virtual environment of its own, whose packages this one sees too
        "$image" -c 'import site; print(*site.getsitepackages(), sep="\n")' > \
            "$(echo .venv/lib/python3*/site-packages)/image.pth"
    fi
    .venv/bin/python -m pip install -q -r requirements.txt
    touch .venv/ready
fi
if [ "$gpu" = gpu ]; then
    .venv/bin/python -c 'import torch; torch.zeros(1).cuda()' || exit 42
fi
cp -n fetched/*.pth . 2>/dev/null || true  # of an instance that was taken away
if ! tmux has-session -t train 2>/dev/null; then
    touch train.log
    tmux new-session -d -s train \
        ".venv/bin/python train.py $(printf '%q ' "$@") 2>&1 | tee -a train.log${shutdown:+; sudo shutdown -h +$shutdown}"
fi
tail -n +1 -f train.log &
trap "kill $!" EXIT
while tmux has-session -t train 2>/dev/null; do sleep 1; done
sleep 1
