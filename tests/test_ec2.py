"""The blocks of README.md's "Training on EC2", run against a local stand-in for AWS and a local sshd."""

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

import models
from conftest import ROOT
from support import checkpoint

README = (ROOT / "README.md").read_text()
SECTION = README.split("\n## Training on EC2\n")[1].split("\n## ")[0]
BLOCKS = dict(enumerate(re.findall(r"```bash\n(.*?)```", SECTION, re.DOTALL), 1))
NEEDS = "aws", "sshd", "ssh-keygen", "rsync", "tmux"
PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}{os.pathsep}/usr/sbin"
MISSING = [program for program in NEEDS if not shutil.which(program, path=PATH)]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}: see .ci/run")
ADDRESS = "203.0.113.7"
GPU, UBUNTU = "Deep Learning OSS Nvidia Driver AMI GPU", "ubuntu/images/hvm-ssd-gp3/ubuntu-noble-24.04"
AMAZON, CANONICAL = "898082745236", "099720109477"
IMAGES = [  # name, owner, architecture, day of creation; of each kind the newest comes first
    (f"{GPU} PyTorch 2.9 (Ubuntu 24.04) 20261101", AMAZON, "x86_64", 20),
    (f"{UBUNTU}-amd64-server-20261115", CANONICAL, "x86_64", 19),
    (f"{GPU} PyTorch 2.8 (Ubuntu 24.04) 20260901", AMAZON, "x86_64", 10),
    (f"{UBUNTU}-amd64-server-20260101", CANONICAL, "x86_64", 9),
    ("Deep Learning ARM64 AMI OSS Nvidia Driver GPU PyTorch 2.9 (Ubuntu 24.04)", AMAZON, "arm64", 25),
    (f"{GPU} TensorFlow 2.19 (Ubuntu 22.04) 20261121", AMAZON, "x86_64", 26),
    (f"{UBUNTU}-arm64-server-20261116", CANONICAL, "arm64", 27),
]


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def wait_until(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def answers(port):
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


def write_script(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


@pytest.fixture(scope="module")
def moto_port(tmp_path_factory):
    """The port of a local server that answers as EC2 does, and knows the images above."""
    images = [
        {
            "ami_id": f"ami-{index:017}",
            "name": name,
            "description": name,
            "owner_id": owner,
            "public": True,
            "virtualization_type": "hvm",
            "architecture": architecture,
            "state": "available",
            "hypervisor": "xen",
            "image_type": "machine",
            "root_device_type": "ebs",
            "root_device_name": "/dev/sda1",
            "creation_date": f"2026-11-{day:02}T00:00:00.000Z",
        }
        for index, (name, owner, architecture, day) in enumerate(IMAGES)
    ]
    path = tmp_path_factory.mktemp("moto") / "images.json"
    path.write_text(json.dumps(images))
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    environment = os.environ | {"MOTO_AMIS_PATH": str(path)}
    with (path.parent / "log").open("w") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    wait_until(lambda: answers(port))
    yield port
    server.kill()
    server.wait()


class Terminal:
    """Pastes blocks into bash, with a throw-away home and `aws` calling the stand-in."""

    def __init__(self, home, port):
        self.home, self.ssh = home, home / ".ssh"
        programs = home / "programs"
        programs.mkdir()
        self.calls = home / "calls"
        key = self.ssh / "mnist.pem"
        # Notes each call, and the key file's mode around it.
        mode = f"stat -c %a {key} >> {home / 'modes'} 2> /dev/null"
        aws = shlex.quote(shutil.which("aws", path=PATH))
        note = f'echo "$1 $2 $3" >> {self.calls}'
        write_script(programs / "aws", f'{note}\n{mode}\n{aws} "$@"\nstatus=$?\n{mode}\nexit $status')
        write_script(programs / "curl", f"echo {ADDRESS}")
        self.environment = {
            "HOME": str(home),
            "PATH": f"{programs}{os.pathsep}{PATH}",
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "OMP_NUM_THREADS": "1",
        }

    def start(self, *numbers, before="", cwd=None, replace=()):
        text = before + "\n".join(BLOCKS[number] for number in numbers)
        for old, new in replace:
            assert old in text, old
            text = text.replace(old, new)
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL}
        return subprocess.Popen(
            ["bash", "-c", f"umask 0\n{text}"], cwd=cwd or self.home, env=self.environment, text=True, **pipes
        )

    def paste(self, *numbers, **options):
        process = self.start(*numbers, **options)
        output, errors = process.communicate()
        return output, errors

    def aws(self, *arguments):
        command = [shutil.which("aws", path=PATH), *arguments, "--region", "us-east-1", "--output", "json"]
        return json.loads(subprocess.check_output(command, env=self.environment))

    def what_is_there(self):
        instances = [
            instance
            for reservation in self.aws("ec2", "describe-instances")["Reservations"]
            for instance in reservation["Instances"]
            if instance["State"]["Name"] != "terminated"
        ]
        groups = self.aws("ec2", "describe-security-groups")["SecurityGroups"]
        groups = [group for group in groups if group["GroupName"] != "default"]
        volumes = self.aws("ec2", "describe-volumes")["Volumes"]
        return self.aws("ec2", "describe-key-pairs")["KeyPairs"], groups, instances, volumes


@pytest.fixture
def terminal(tmp_path, moto_port):
    reset = urllib.request.Request(f"http://127.0.0.1:{moto_port}/moto-api/reset", method="POST")
    urllib.request.urlopen(reset).close()
    home = tmp_path / "home"
    home.mkdir()
    return Terminal(home, moto_port)


def test_there_are_nine_blocks():
    assert list(BLOCKS) == list(range(1, 10))
    assert all(f"**{number}. " in SECTION for number in BLOCKS)


def test_blocks_2_to_5_make_what_they_say_and_9_leaves_nothing(terminal):
    output, errors = terminal.paste(1, 2, 3, 4, 5)
    assert errors == "" and '"Account"' in output
    (key,), (group,), (instance,), (volume,) = terminal.what_is_there()
    assert key["KeyName"] == "mnist" and key["KeyType"] == "ed25519"
    (rule,) = group["IpPermissions"]
    assert (rule["IpProtocol"], rule["FromPort"], rule["ToPort"]) == ("tcp", 22, 22)
    assert [entry["CidrIp"] for entry in rule["IpRanges"]] == [f"{ADDRESS}/32"]
    assert not rule.get("Ipv6Ranges") and not rule.get("UserIdGroupPairs") and not rule.get("PrefixListIds")
    assert instance["ImageId"] == "ami-00000000000000000" and instance["InstanceType"] == "g4dn.xlarge"
    assert instance["KeyName"] == "mnist"
    assert [found["GroupName"] for found in instance["SecurityGroups"]] == ["mnist"]
    assert instance["MetadataOptions"]["HttpTokens"] == "required"
    assert instance["Tags"] == [{"Key": "Name", "Value": "mnist"}]
    assert "InstanceLifecycle" not in instance
    ask = "ec2", "describe-instance-attribute", "--instance-id", instance["InstanceId"], "--attribute"
    behaviour = terminal.aws(*ask, "instanceInitiatedShutdownBehavior")
    assert behaviour["InstanceInitiatedShutdownBehavior"]["Value"] == "terminate"
    assert (volume["Size"], volume["VolumeType"], volume["Encrypted"]) == (100, "gp3", True)
    assert instance["BlockDeviceMappings"][0]["Ebs"]["DeleteOnTermination"] is True
    assert output.splitlines()[-1] == instance["PublicIpAddress"]

    assert (terminal.ssh / "mnist.pem").read_text().startswith("-----BEGIN")
    assert terminal.ssh.stat().st_mode & 0o777 == 0o700
    the_rest = BLOCKS[9][BLOCKS[9].index("for kind") :]
    output, _ = terminal.paste(1, replace=[("aws sts get-caller-identity", the_rest)])
    assert all(what in output for what in (key["KeyPairId"], group["GroupId"], volume["VolumeId"]))
    output, errors = terminal.paste(1, 9)
    assert errors == "" and output.endswith("}\n")  # what delete-key-pair answers, and nothing after it
    assert terminal.what_is_there() == ([], [], [], [])
    assert list(terminal.ssh.iterdir()) == []
    assert set((terminal.home / "modes").read_text().split()) == {"400"}


def test_pasting_twice_makes_everything_once_and_keeps_the_key(terminal):
    terminal.paste(1, 2, 3, 4, 5)
    key = (terminal.ssh / "mnist.pem").read_text()
    before = terminal.what_is_there()
    write_script(terminal.home / "programs" / "curl", "echo 198.51.100.9")
    output, errors = terminal.paste(1, 2, 3, 4, 5)
    assert "cannot overwrite existing file" in errors and "InvalidGroup.Duplicate" in errors
    assert (terminal.ssh / "mnist.pem").read_text() == key
    keys, (group,), instances, volumes = terminal.what_is_there()
    assert (keys, instances, volumes) == (before[0], before[2], before[3])
    (rule,) = group["IpPermissions"]
    assert [entry["CidrIp"] for entry in rule["IpRanges"]] == ["198.51.100.9/32"]
    terminal.paste(1, 9)
    terminal.paste(1, 9)
    assert terminal.what_is_there() == ([], [], [], [])
    assert list(terminal.ssh.iterdir()) == []


@pytest.mark.parametrize("last", [2, 3])  # block 4 makes nothing, and 5 is tried above
def test_after_any_block_the_last_one_leaves_nothing(terminal, last):
    terminal.paste(*range(1, last + 1))
    assert len(terminal.what_is_there()[0]) == 1
    terminal.paste(1, 9)
    assert terminal.what_is_there() == ([], [], [], [])
    assert list(terminal.ssh.iterdir()) == []


def test_a_key_that_cannot_be_made_leaves_no_empty_file(terminal):
    terminal.paste(1, 2)
    (terminal.ssh / "mnist.pem").unlink()
    _, errors = terminal.paste(1, 2)
    assert "InvalidKeyPair.Duplicate" in errors
    assert list(terminal.ssh.iterdir()) == []


def test_a_cpu_type_gets_plain_ubuntu_and_spot_a_spot_instance(terminal):
    choices = ("type=g4dn.xlarge", "type=c7i.large"), ("spot=\n", "spot=yes\n")
    _, errors = terminal.paste(1, 2, 3, 4, 5, replace=choices)
    assert errors == ""
    *_, (instance,), _ = terminal.what_is_there()
    assert instance["ImageId"] == "ami-00000000000000001" and instance["InstanceType"] == "c7i.large"
    assert instance["InstanceLifecycle"] == "spot"


def test_the_policy_allows_what_the_blocks_call_and_no_more(terminal):
    terminal.paste(1, 2, 3, 3, 4, 5)
    terminal.paste(1, 9)
    called = {"ec2:CreateTags"}  # --tag-specifications
    waits = {"instance-status-ok": "describe-instance-status", "instance-terminated": "describe-instances"}
    for line in terminal.calls.read_text().splitlines():
        service, command, *argument = line.split()
        command = waits[argument[0]] if command == "wait" else command
        called.add(f"{service}:{command.title().replace('-', '')}")
    (policy,) = re.findall(r"```json\n(.*?)```", SECTION, re.DOTALL)
    (statement,) = json.loads(policy)["Statement"]
    assert statement["Effect"] == "Allow" and set(statement["Action"]) == called


@pytest.fixture
def instance(terminal, tmp_path):
    """A local sshd with a home of its own, in the part of the instance; returns that home."""
    remote = tmp_path / "remote"
    programs = remote / "programs"
    programs.mkdir(parents=True)
    terminal.paste(1, 2)
    key = terminal.ssh / "mnist.pem"
    public = subprocess.check_output(["ssh-keygen", "-y", "-f", key], text=True)
    (remote / "authorized_keys").write_text(public)
    (remote / "authorized_keys").chmod(0o600)
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", remote / "host_key"], check=True)
    write_script(programs / "sudo", f'echo "$@" >> {remote / "sudo"}')  # apt-get is not to be run here
    write_script(programs / "login", f'cd {remote} && eval "$SSH_ORIGINAL_COMMAND"')
    (programs / "python3").symlink_to(sys.executable)
    packages = [path for path in sys.path if path.endswith("site-packages")]
    environment = {
        "HOME": remote,
        "PATH": f"{programs}{os.pathsep}{PATH}",
        "PYTHONPATH": os.pathsep.join(packages),  # so that pip finds what the project requires
        "PIP_NO_INDEX": 1,
        "TMUX_TMPDIR": remote,
        "OMP_NUM_THREADS": 1,
    }
    port = free_port()
    (remote / "sshd_config").write_text(
        f"ListenAddress 127.0.0.1:{port}\nHostKey {remote / 'host_key'}\nPidFile {remote / 'pid'}\n"
        f"AuthorizedKeysFile {remote / 'authorized_keys'}\nStrictModes no\nUsePAM no\n"
        f"PasswordAuthentication no\nPermitRootLogin prohibit-password\nForceCommand {programs / 'login'}\n"
        "SetEnv " + " ".join(f'"{name}={value}"' for name, value in environment.items()) + "\n"
    )
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)
    with (remote / "log").open("w") as log:
        command = [shutil.which("sshd", path=PATH), "-D", "-e", "-f", remote / "sshd_config"]
        server = subprocess.Popen(command, stderr=log)
    wait_until(lambda: answers(port))
    # ssh reads the real home's configuration, and the part of "ubuntu" is played by whoever runs the tests.
    user = subprocess.check_output(["id", "-un"], text=True).strip()
    ssh = f'exec {shutil.which("ssh")} -F {terminal.ssh / "config"} -o Port={port} -o User={user} "$@"'
    write_script(terminal.home / "programs" / "ssh", ssh)
    yield remote
    of_the_instance = os.environ | {"TMUX_TMPDIR": str(remote)}
    subprocess.run(["tmux", "kill-server"], env=of_the_instance, stderr=subprocess.DEVNULL)
    server.terminate()
    server.wait()


def test_training_survives_the_connection_and_the_model_comes_back(terminal, instance, small_data):
    clone = terminal.home / "clone"
    shutil.copytree(ROOT, clone, ignore=shutil.ignore_patterns(".git", "*.pth", "__pycache__", "MNIST"))
    shutil.copytree(small_data / "MNIST", clone / "data" / "MNIST")
    (clone / "last_Model_1.pth").write_text("of another run, not to be sent")
    host = "host=127.0.0.1\n"
    _, errors = terminal.paste(1, 6, before=host)
    assert errors.count("\n") == 1 and "Permanently added" in errors
    assert (terminal.ssh / "config").stat().st_mode & 0o777 == 0o600
    entry = (terminal.ssh / "config").read_text()
    _, errors = terminal.paste(1, 6, before=host)
    assert (terminal.ssh / "config").read_text() == entry

    epochs = 200
    options = f"train.py --model Model_1 --epochs {epochs} --device cpu --data-dir data"
    changes = {"train.py --resume": f"{options} --resume", "=true": "='sudo shutdown -h +60'"}
    following = terminal.start(1, 7, before=host, cwd=clone, replace=changes.items())
    log = instance / "mnist" / "train.log"
    wait_until(lambda: log.exists() and "Epoch: 2/" in log.read_text())
    # The connection breaks: the servers of all sessions are killed.
    sessions = subprocess.check_output(["pgrep", "-P", (instance / "pid").read_text().strip()], text=True)
    for session in sessions.split():
        os.kill(int(session), signal.SIGKILL)
    output, errors = following.communicate(timeout=60)
    assert "Epoch: 1/" in output
    assert f"Epoch: {epochs}/" not in log.read_text()  # it was under way
    wait_until(lambda: "\nTime: " in log.read_text())
    wait_until(lambda: "shutdown" in (instance / "sudo").read_text())
    assert (instance / "sudo").read_text().splitlines() == [
        "apt-get -q update",
        "apt-get -qy install python3-venv tmux",
        "shutdown -h +60",
    ]

    output, errors = terminal.paste(1, 8, before=host, cwd=clone, replace=[("best_Model_3", "best_Model_1")])
    assert "best_Model_1.pth: OK\n" in output
    model = checkpoint.load(clone / "best_Model_1.pth")
    assert isinstance(model, models.Model_1)
    assert (clone / "train.log").read_text() == log.read_text()

    terminal.paste(1, 9)
    assert sorted(path.name for path in terminal.ssh.iterdir()) == ["config"]
    assert (terminal.ssh / "config").read_text() == ""


def test_the_entry_leaves_the_rest_of_the_configuration_alone(terminal, instance):
    mine = "Host other\n    User me\n"
    (terminal.ssh / "config").write_text(mine)
    terminal.paste(1, 6, before="host=127.0.0.1\n")
    assert (terminal.ssh / "config").read_text().startswith(mine)
    assert "Host mnist\n" in (terminal.ssh / "config").read_text()
    terminal.paste(1, 9)
    assert (terminal.ssh / "config").read_text() == mine


def test_ssh_refuses_a_key_that_others_can_read(terminal, instance):
    (terminal.ssh / "mnist.pem").chmod(0o644)
    _, errors = terminal.paste(1, 6, before="host=127.0.0.1\n")
    assert "UNPROTECTED PRIVATE KEY FILE" in errors and "Permission denied (publickey" in errors
    (terminal.ssh / "mnist.pem").chmod(0o400)
    output, errors = terminal.paste(1, 6, before="host=127.0.0.1\n")
    assert "Permission denied" not in errors and os.uname().release in output
