"""support/ec2.py against moto, which plays EC2 in this process, and against a local OpenSSH server."""

import contextlib
import functools
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import boto3
import botocore.client
import pytest
import torch
from botocore.exceptions import ClientError, EndpointConnectionError, NoCredentialsError

import models
from conftest import ROOT, saved_states
from support import checkpoint, ec2

README = (ROOT / "README.md").read_text()
SECTION = README.split("\n## Training on EC2\n")[1].split("\n## ")[0]
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


@pytest.fixture(scope="module")
def moto(tmp_path_factory):
    """moto's `mock_aws`, which knows the images above."""
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
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOTO_AMIS_PATH", str(path))  # read when moto is imported, and at each start
        from moto import mock_aws

        yield mock_aws


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home with its own ssh configuration and keys, and a folder to work in; nothing of it may change."""
    home = tmp_path / "home"
    (home / ".ssh").mkdir(parents=True)
    (home / ".ssh" / "config").write_text("Host other\n    User me\n")
    (home / ".ssh" / "mnist.pem").write_text("a key of the user's own")
    before = {path: path.read_bytes() for path in home.rglob("*") if path.is_file()}
    monkeypatch.setenv("HOME", str(home))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    yield home
    assert before == {path: path.read_bytes() for path in before}
    assert set((home / ".ssh").iterdir()) == before.keys()


@pytest.fixture
def aws(moto, home, monkeypatch, capfd):
    """Calls `python -m support.ec2` in this process; returns what it printed, or its sentence."""
    for name, value in {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    aws = Aws(home, capfd)

    @functools.lru_cache
    def resource(region, kind):  # it takes a while to read AWS's description of itself
        return boto3.session.Session(region_name=region).resource(kind)

    def session(region_name):
        return SimpleNamespace(resource=lambda kind, config: resource(region_name, kind))

    monkeypatch.setattr(ec2, "boto3", SimpleNamespace(Session=session))
    monkeypatch.setattr(ec2.urllib.request, "urlopen", lambda *_, **__: io.BytesIO(aws.address.encode()))
    with moto():
        real = botocore.client.BaseClient._make_api_call

        def watched(client, operation, parameters):
            aws.calls.append(operation)
            aws.before(operation)
            answer = real(client, operation, parameters)
            if operation == "DescribeRegions":  # three of them will do
                names = "us-east-1", "eu-west-1", "ap-south-1"
                answer["Regions"] = [region for region in answer["Regions"] if region["RegionName"] in names]
            aws.after(operation)
            return answer

        monkeypatch.setattr(botocore.client.BaseClient, "_make_api_call", watched)
        yield aws


@functools.lru_cache
def client_of(region):
    return boto3.client("ec2", region_name=region)


class Aws:
    def __init__(self, home, capfd):
        self.folder, self.capfd, self.address, self.calls = home / ".tiny-mnist", capfd, f"{ADDRESS}\n", []
        self.untroubled()

    def untroubled(self):
        """Has no call fail."""
        self.before = self.after = lambda operation: None

    def __call__(self, *arguments):
        self.capfd.readouterr()
        try:
            ec2.main(list(map(str, arguments)))
        except SystemExit as error:
            return str(error.code)
        return self.capfd.readouterr().out

    def refuse(self, operation, code):
        def before(called):
            if called == operation:
                raise ClientError({"Error": {"Code": code, "Message": "as EC2 says"}}, called)

        self.before = before

    def forget_terminated(self):
        """Makes an account without a history, whose answers are faster."""
        from moto.ec2 import ec2_backends

        for regions in ec2_backends.values():
            regions["us-east-1"].reset()

    def there(self, region="us-east-1"):
        """Keys, groups other than the default one, instances and volumes, past failures of calls."""
        self.untroubled()
        client = client_of(region)
        groups = client.describe_security_groups()["SecurityGroups"]
        found = [one for some in client.describe_instances()["Reservations"] for one in some["Instances"]]
        return (
            client.describe_key_pairs()["KeyPairs"],
            [group for group in groups if group["GroupName"] != "default"],
            [instance for instance in found if instance["State"]["Name"] != "terminated"],
            client.describe_volumes()["Volumes"],
        )


NOTHING = [], [], [], []


def test_up_makes_what_it_says_and_down_leaves_nothing(aws):
    assert aws("up").endswith("ready\n")
    (key,), (group,), (instance,), (volume,) = aws.there()
    tag = {"Key": "tiny-mnist", "Value": "mnist"}
    assert all(thing["Tags"] == [tag] for thing in (key, group, instance, volume))
    assert key["KeyName"] == "mnist" and key["KeyType"] == "ed25519"
    (rule,) = group["IpPermissions"]
    assert (rule["IpProtocol"], rule["FromPort"], rule["ToPort"]) == ("tcp", 22, 22)
    assert [entry["CidrIp"] for entry in rule["IpRanges"]] == [f"{ADDRESS}/32"]
    assert not rule.get("Ipv6Ranges") and not rule.get("UserIdGroupPairs") and not rule.get("PrefixListIds")
    assert instance["ImageId"] == "ami-00000000000000000" and instance["InstanceType"] == "g4dn.xlarge"
    assert instance["KeyName"] == "mnist" and "InstanceLifecycle" not in instance
    assert [found["GroupId"] for found in instance["SecurityGroups"]] == [group["GroupId"]]
    assert instance["MetadataOptions"]["HttpTokens"] == "required"
    ask = {"InstanceId": instance["InstanceId"], "Attribute": "instanceInitiatedShutdownBehavior"}
    answer = boto3.client("ec2").describe_instance_attribute(**ask)
    assert answer["InstanceInitiatedShutdownBehavior"]["Value"] == "terminate"
    assert (volume["Size"], volume["VolumeType"], volume["Encrypted"]) == (100, "gp3", True)
    assert instance["BlockDeviceMappings"][0]["Ebs"]["DeleteOnTermination"] is True

    key_file = aws.folder / "mnist" / "key.pem"
    assert key_file.read_text().startswith("-----BEGIN") and key_file.stat().st_mode & 0o777 == 0o600
    assert (aws.folder / "mnist").stat().st_mode & 0o777 == 0o700
    assert f"{instance['InstanceId']} is running" in aws("status")
    output = aws("down")
    for thing in instance["InstanceId"], group["GroupId"], volume["VolumeId"], key["KeyPairId"]:
        assert thing in output
    assert output.endswith("nothing is left\n") and aws.there() == NOTHING
    assert not (aws.folder / "mnist").exists()
    assert aws("down") == "us-east-1: ended nothing; nothing is left\n"


def test_nobody_can_read_the_key_at_any_moment(aws):
    modes = []

    def look(operation):
        modes.extend(path.stat().st_mode & 0o777 for path in aws.folder.rglob("key.pem"))

    aws.before = aws.after = look
    mask = os.umask(0)
    try:
        aws("up")
    finally:
        os.umask(mask)
    assert set(modes) == {0o600}


@pytest.fixture
def no_ssh(monkeypatch):
    """Has every connection fail at once."""
    failed = subprocess.CompletedProcess([], 255)
    monkeypatch.setattr(ec2.subprocess, "run", lambda *_, **__: failed)


def test_a_second_up_makes_nothing_and_follows_this_computers_address(aws, no_ssh):
    aws("up")
    before, key = aws.there(), (aws.folder / "mnist" / "key.pem").read_bytes()
    aws.address = "198.51.100.9\n"
    assert "SSH is open to 198.51.100.9/32 alone\n" in aws("up")
    keys, (group,), instances, volumes = aws.there()
    assert (keys, instances, volumes) == (before[0], before[2], before[3])
    (rule,) = group["IpPermissions"]
    assert [entry["CidrIp"] for entry in rule["IpRanges"]] == ["198.51.100.9/32"]
    assert (aws.folder / "mnist" / "key.pem").read_bytes() == key
    aws.address = f"{ADDRESS}\n"
    assert aws("fetch") == "ec2: error: the connection failed: try again in a minute, or look at `status`"
    (rule,) = aws.there()[1][0]["IpPermissions"]
    assert [entry["CidrIp"] for entry in rule["IpRanges"]] == [f"{ADDRESS}/32"]


def test_a_cpu_type_gets_plain_ubuntu_and_spot_a_spot_instance(aws):
    aws("up", "--type", "c7i.large", "--spot", "--zone", "us-east-1b")
    (instance,) = aws.there()[2]
    assert instance["ImageId"] == "ami-00000000000000001" and instance["InstanceType"] == "c7i.large"
    assert instance["InstanceLifecycle"] == "spot"
    assert instance["Placement"]["AvailabilityZone"] == "us-east-1b"


def test_without_credentials_nothing_is_written_or_asked_for(aws, home):
    def none(operation):
        raise NoCredentialsError

    aws.before = none
    assert "`aws configure` was not done" in aws("up")
    assert aws.there() == NOTHING and not aws.folder.exists()


@pytest.mark.parametrize(
    "code, said",
    [
        ("VcpuLimitExceeded", "ask for more under Service Quotas"),
        ("InsufficientInstanceCapacity", "try another --zone, another --type, or with or without --spot"),
        ("MaxSpotInstanceCountExceeded", "ask for more under Service Quotas"),
        ("UnauthorizedOperation", "your AWS user may not RunInstances: see the policy"),
        ("SomethingNew", "RunInstances failed (SomethingNew: as EC2 says)"),
    ],
)
def test_an_instance_that_is_refused_is_one_sentence_and_down_leaves_nothing(aws, code, said):
    aws.refuse("RunInstances", code)
    sentence = aws("up", "--spot")
    assert sentence.startswith("ec2: error: ") and said in sentence and "\n" not in sentence
    assert aws.there()[2:] == ([], [])
    assert not (aws.folder / "mnist" / "ssh_config").exists()
    aws("down")
    assert aws.there() == NOTHING and not (aws.folder / "mnist").exists()


def test_no_default_vpc_is_named(aws):
    aws.refuse("CreateSecurityGroup", "VPCIdNotSpecified")
    assert "there is no default VPC: `aws ec2 create-default-vpc`" in aws("up")


def test_what_was_started_in_another_region_is_found_and_ended(aws):
    aws("up", "--region", "eu-west-1")
    assert len(aws.there("eu-west-1")[2]) == 1
    assert "is in eu-west-1: `down` first" in aws("up", "--region", "us-east-1")
    assert aws("down").startswith("eu-west-1: ended i-")  # in a new terminal, whose region is another
    assert aws.there("eu-west-1") == NOTHING

    aws("up", "--region", "eu-west-1")
    shutil.rmtree(aws.folder)  # nothing knows of it any more
    assert aws("down") == "us-east-1: ended nothing; nothing is left\n"
    assert re.search("^eu-west-1: ended i-", aws("down", "--all-regions"), re.MULTILINE)
    assert aws.there("eu-west-1") == NOTHING


def test_what_is_here_is_deleted_last_and_only_once_ec2_has_confirmed(aws):
    aws("up")
    for operation in "DescribeInstances", "TerminateInstances", "DeleteSecurityGroup", "DeleteKeyPair":
        aws.refuse(operation, "ExpiredToken")
        assert "your AWS credentials have expired: log in again" in aws("down")
        assert (aws.folder / "mnist" / "key.pem").exists() and (aws.folder / "mnist" / "notes.json").exists()
    aws.untroubled()
    aws("down")
    assert aws.there() == NOTHING and not (aws.folder / "mnist").exists()


def test_keys_and_groups_of_the_users_own_are_neither_used_nor_deleted(aws):
    client = boto3.client("ec2")
    client.create_key_pair(KeyName="mnist")
    assert "something in EC2 is called 'mnist' already: choose another --name" in aws("up")
    assert aws.there()[2] == []
    aws("down")
    assert [key["KeyName"] for key in aws.there()[0]] == ["mnist"]
    client.delete_key_pair(KeyName="mnist")
    client.create_security_group(GroupName="mnist", Description="mine")
    assert "something in EC2 is called 'mnist' already: choose another --name" in aws("up")
    aws("down")
    assert [group["GroupName"] for group in aws.there()[1]] == ["mnist"]


def test_a_key_whose_file_is_lost_starts_no_instance(aws):
    aws("up")
    shutil.rmtree(aws.folder)
    (instance,) = aws.there()[2]
    boto3.client("ec2").terminate_instances(InstanceIds=[instance["InstanceId"]])
    assert "the key of what is in EC2 is not here: `down`, then `up` again" in aws("up")
    assert aws.there()[2] == []
    aws("down")
    assert aws("up").endswith("ready\n")


def test_a_key_file_of_the_users_own_is_neither_used_nor_deleted(aws):
    mine = aws.folder / "mnist" / "key.pem"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    assert f"{mine} was not written by these steps: move it away" in aws("up")
    assert aws.there()[2] == []
    aws("down")
    assert mine.read_text() == "mine"


def test_a_full_disk_while_the_key_is_written_costs_nothing(aws, monkeypatch):
    class Full(io.StringIO):
        def write(self, text):
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(ec2.os, "fdopen", lambda descriptor, mode: Full())
        assert "No space left on device" in aws("up")
    assert aws.there()[1:] == ([], [], [])
    assert aws("up").endswith("ready\n")
    assert (aws.folder / "mnist" / "key.pem").stat().st_size > 0


@pytest.mark.parametrize("name", ["two words", "it's", 'a"b', "", "-x", "a/b", "x" * 64])
def test_a_name_that_would_need_quoting_is_refused(aws, name):
    assert aws("up", f"--name={name}") == "2"
    assert aws.calls == [] and not aws.folder.exists()


def test_of_two_ups_at_once_the_second_stops(aws):
    (aws.folder / "mnist").mkdir(parents=True)
    first = ec2.lock(ec2.Place("mnist"))
    assert aws("up") == "ec2: error: another `up` of this name is under way"
    assert aws.there() == NOTHING
    first.close()
    assert aws("up").endswith("ready\n")


def test_a_spot_instance_that_was_taken_away_is_named_and_replaced(aws):
    aws("up", "--spot")
    (instance,) = aws.there()[2]
    boto3.client("ec2").terminate_instances(InstanceIds=[instance["InstanceId"]])
    sentence = aws("train", "--resume")
    assert "A spot instance that was taken away is gone" in sentence and "`up` again" in sentence
    assert aws("up", "--spot").endswith("ready\n")
    assert len(aws.there()[2]) == 1


def error(code):
    return ClientError({"Error": {"Code": code, "Message": "as EC2 says"}}, "Operation")


LOST = EndpointConnectionError(endpoint_url="https://ec2")
REFUSED = [error("RequestLimitExceeded"), error("UnauthorizedOperation"), error("ExpiredToken"), LOST]


@pytest.mark.parametrize(
    "troubles, when",
    [
        (REFUSED, "before"),
        ([KeyboardInterrupt()], "before"),
        ([LOST], "after"),
        ([KeyboardInterrupt()], "after"),
    ],
    ids=["refused", "Ctrl-C before", "answer lost", "Ctrl-C after"],
)
def test_after_any_call_that_fails_up_goes_on_and_down_leaves_nothing(aws, troubles, when):
    """Each call of `up` and of `down` in turn, before it and, as where an answer is lost, after it."""
    aws("up")
    number_of_calls = {"up": len(aws.calls)}
    aws.calls.clear()
    aws("down")
    number_of_calls["down"] = len(aws.calls)
    for command, number in number_of_calls.items():
        for last in range(1, number + 1):
            aws("up") if command == "down" else None
            aws.calls.clear()

            def fail(operation, last=last):
                if len(aws.calls) == last:
                    raise troubles[last % len(troubles)]

            setattr(aws, when, fail)
            sentence = aws(command)
            assert sentence.startswith(("ec2: error: ", "ec2: interrupted: ")) and "\n" not in sentence
            aws.untroubled()
            if last % 2:
                assert aws("up").endswith("ready\n")
                assert [len(things) for things in aws.there()] == [1, 1, 1, 1]
            aws("down")
            assert aws.there() == NOTHING and not (aws.folder / "mnist").exists()
            aws.forget_terminated()


def write_script(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def wait_until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def answers(port):
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}{os.pathsep}/usr/sbin"
MISSING = [program for program in ("sshd", "ssh-keygen", "tmux") if not shutil.which(program, path=PATH)]


@pytest.fixture
def instance(request, aws, tmp_path, monkeypatch, small_data):
    """Makes an instance, played by a local sshd with a home of its own; returns that home."""
    if MISSING:
        pytest.skip(f"needs {', '.join(MISSING)}: see .ci/run")
    remote = tmp_path / "remote"
    programs = remote / "programs"
    programs.mkdir(parents=True)
    aws("up", "--type", getattr(request, "param", "c7i.large"))  # without a GPU
    key = aws.folder / "mnist" / "key.pem"
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
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
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
    # The part of "ubuntu", at the instance's address, is played by whoever runs the tests, here.
    local = tmp_path / "programs"
    local.mkdir()
    user = subprocess.check_output(["id", "-un"], text=True).strip()
    options = f"-o Port={port} -o User={user} -o HostName=127.0.0.1"
    write_script(local / "ssh", f'exec {shutil.which("ssh")} {options} "$@"')
    monkeypatch.setenv("PATH", f"{local}{os.pathsep}{os.environ['PATH']}")
    clone = tmp_path / "clone"
    left_out = shutil.ignore_patterns(".git", "*.pth", "__pycache__", "MNIST", "tests")
    shutil.copytree(ROOT, clone, ignore=left_out)
    shutil.copytree(small_data / "MNIST", clone / "data" / "MNIST")
    monkeypatch.setattr(ec2, "PROJECT", clone)
    yield remote
    of_the_instance = os.environ | {"TMUX_TMPDIR": str(remote)}
    subprocess.run(["tmux", "kill-server"], env=of_the_instance, stderr=subprocess.DEVNULL)
    server.terminate()
    server.wait()


def test_training_survives_the_connection_and_the_model_comes_back(aws, instance, tmp_path):
    flags = "--model", "Model_1", "--epochs", "150", "--device", "cpu", "--resume"
    log = instance / "mnist" / "train.log"

    def interrupt():
        wait_until(lambda: log.exists() and "Epoch: 2/" in log.read_text())
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    output = aws("train", "--shutdown", "60", *flags)
    assert "Epoch: 1/150" in output and "the training goes on" in output

    def sessions():
        pid = (instance / "pid").read_text().strip()
        found = subprocess.run(["pgrep", "-P", pid], capture_output=True, text=True).stdout
        return {int(session) for session in found.split()}

    def end_sessions():
        for session in sessions():
            with contextlib.suppress(ProcessLookupError):
                os.kill(session, signal.SIGKILL)

    def break_connection():  # of a session that has lasted for two seconds: what follows the log
        wait_until(lambda: (before := sessions()) and not time.sleep(2) and before & sessions())
        end_sessions()

    end_sessions()  # what is left of the first one
    threading.Thread(target=break_connection).start()
    assert "the connection failed" in aws("train", *flags)
    assert "Epoch: 150/" not in log.read_text()  # it is under way
    output = aws("train", *flags)  # follows it to its end, and starts no second one
    assert output.count("Epoch: 1/150") == 1 and "\nTime: " in output
    wait_until(lambda: "shutdown" in (instance / "sudo").read_text())
    assert (instance / "sudo").read_text().splitlines() == [
        "apt-get -q -o DPkg::Lock::Timeout=300 update",
        "apt-get -qy -o DPkg::Lock::Timeout=300 install python3-venv tmux",
        "shutdown -h +60",
    ]

    output = aws("fetch")
    assert "ec2/best_Model_1.pth: " in output and output.count("same checksum") == 3
    assert isinstance(checkpoint.load(Path("ec2/best_Model_1.pth")), models.Model_1)
    assert Path("ec2/train.log").read_text() == log.read_text()
    fetched = saved_states(Path("ec2"))

    # Where the instance was taken away, another one goes on with what was fetched.
    shutil.rmtree(instance / "mnist")
    output = aws("train", *flags[:2], "--epochs", "151", *flags[4:])
    assert "last_Model_1.pth is resumed after epoch 150\n" in output and "Epoch: 151/151" in output
    assert fetched["last_Model_1.pth"]["settings"]["model"] == "Model_1"
    assert aws("ssh", "echo", "from there") == "0"
    aws("down")
    assert aws.there() == NOTHING and not (aws.folder / "mnist").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="here it can")
@pytest.mark.parametrize("instance", ["g4dn.xlarge"], indirect=True)
def test_a_gpu_that_pytorch_cannot_use_is_named_before_training(aws, instance):
    sentence = aws("train", "--model", "Model_1")
    assert sentence.startswith("ec2: error: nothing was trained (PyTorch cannot use the GPU)")
    assert not (instance / "mnist" / "train.log").exists()


def test_fetching_what_is_not_there_yet_is_one_sentence(aws, instance):
    assert aws("fetch") == "ec2: error: there is nothing to fetch yet"


def test_the_policy_suffices_and_has_no_more_than_what_is_called(aws, no_ssh):
    (policy,) = re.findall(r"```json\n(.*?)```", SECTION, re.DOTALL)
    (statement,) = json.loads(policy)["Statement"]
    allowed = {action.removeprefix("ec2:") for action in statement["Action"]}
    called = {"CreateTags"}  # what TagSpecifications ask for

    def deny(operation):
        called.add(operation)
        if operation not in allowed:
            raise ClientError({"Error": {"Code": "UnauthorizedOperation", "Message": "no"}}, operation)

    aws.before = deny
    assert aws("up").endswith("ready\n")
    aws.address = "198.51.100.9\n"
    aws("fetch")
    aws("status")
    assert aws("down", "--all-regions").endswith("nothing is left\n")
    assert statement["Effect"] == "Allow" and called == allowed


def test_the_section_is_short_and_names_each_command_and_option():
    assert len(SECTION) <= 5_000
    for word in *ec2.COMMANDS, "--spot", "--type", "--region", "--shutdown", "--all-regions":
        assert word in SECTION
