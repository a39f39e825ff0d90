"""support/ec2 with moto in place of AWS, and with a local OpenSSH server in place of the instance.

moto creates, updates and deletes stacks at once: it knows no failures and no waiting. Where a test needs a
status that AWS would report, it puts the status into the answer.
"""

import base64
import functools
import hashlib
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
from datetime import datetime, timedelta, timezone
from pathlib import Path
from types import SimpleNamespace

import boto3
import botocore.client
import pytest
from botocore.exceptions import ClientError, EndpointConnectionError, NoCredentialsError
from botocore.parsers import ResponseParserError

import models
from conftest import ROOT, saved_states
from support import checkpoint
from support.ec2 import __main__ as ec2

GUIDE = (ROOT / "support" / "ec2" / "README.md").read_text()
ADDRESS, OTHER_ADDRESS = "52.94.76.7", "18.130.5.9"
IMAGES = {parameter: f"ami-{index:017}" for index, parameter in enumerate(ec2.IMAGES.values())}


@pytest.fixture(scope="module")
def moto(tmp_path_factory):
    """moto's `mock_aws` with the images above."""
    fields = {"owner_id": "099720109477", "public": True, "virtualization_type": "hvm", "state": "available"}
    fields |= {
        "architecture": "x86_64",
        "hypervisor": "xen",
        "image_type": "machine",
        "root_device_type": "ebs",
    }
    fields |= {"root_device_name": "/dev/sda1", "creation_date": "2026-11-01T00:00:00.000Z"}
    images = [{"ami_id": image, "name": name, "description": name} | fields for name, image in IMAGES.items()]
    path = tmp_path_factory.mktemp("moto") / "images.json"
    path.write_text(json.dumps(images))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOTO_AMIS_PATH", str(path))  # read when moto is imported, and at each start
        from moto import mock_aws

        yield mock_aws


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home directory whose name needs quoting, with SSH files of its own, none of which may change."""
    home = tmp_path / 'a "home" of 100%'
    (home / ".ssh").mkdir(parents=True)
    (home / ".ssh" / "config").write_text("Host *\n    User nobody\n")
    before = {path: path.read_bytes() for path in home.rglob("*") if path.is_file()}
    monkeypatch.setenv("HOME", str(home))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    yield home
    assert before == {path: path.read_bytes() for path in (home / ".ssh").iterdir()}


@functools.lru_cache
def client_of(service, region="us-east-1"):
    return boto3.session.Session(region_name=region).client(service)


class Aws:
    """Calls `python -m support.ec2` in this process; returns its output or error."""

    def __init__(self, home, capfd):
        self.folder, self.capfd, self.address, self.calls = home / ".tiny-mnist", capfd, f"{ADDRESS}\n", []
        self.slept = []
        self.untroubled()

    def untroubled(self):
        self.before = lambda operation, parameters: None
        self.after = lambda operation, parameters, answer: None

    def __call__(self, *arguments):
        self.capfd.readouterr()
        try:
            ec2.main(list(map(str, arguments)))
        except SystemExit as error:
            return str(error.code)
        return self.capfd.readouterr().out

    def refuse(self, operation, code, message="as AWS says"):
        def before(called, parameters):
            if called == operation:
                raise ClientError({"Error": {"Code": code, "Message": message}}, called)

        self.before = before

    def stacks(self, region="us-east-1"):
        return client_of("cloudformation", region).describe_stacks()["Stacks"]

    def groups(self, region="us-east-1"):
        """Security groups, other than the default one."""
        groups = client_of("ec2", region).describe_security_groups()["SecurityGroups"]
        return [group for group in groups if group["GroupName"] != "default"]

    def instances(self, region="us-east-1"):
        """Instances that are charged for."""
        found = client_of("ec2", region).describe_instances()["Reservations"]
        instances = [one for reservation in found for one in reservation["Instances"]]
        return [one for one in instances if one["State"]["Name"] != "terminated"]

    def left(self, region="us-east-1"):
        """Everything that exists, read without simulated failures."""
        self.untroubled()
        client = client_of("ec2", region)
        templates = client.describe_launch_templates()["LaunchTemplates"]
        volumes = client.describe_volumes()["Volumes"]
        return self.stacks(region) + self.instances(region) + self.groups(region) + templates + volumes


@pytest.fixture
def aws(moto, home, monkeypatch, capfd):
    for name in "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY":
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setattr(ec2.getpass, "getuser", lambda: "ada_l")
    aws = Aws(home, capfd)

    def session(profile_name, region_name):
        return SimpleNamespace(client=lambda service: client_of(service, region_name or "us-east-1"))

    monkeypatch.setattr(ec2, "boto3", SimpleNamespace(Session=session))
    monkeypatch.setattr(ec2.urllib.request, "urlopen", lambda *_, **__: io.BytesIO(aws.address.encode()))
    monkeypatch.setattr(ec2.time, "sleep", aws.slept.append)
    aws.ssh = lambda command, **options: subprocess.CompletedProcess(command, 0, b"", b"")
    run = subprocess.run
    monkeypatch.setattr(
        ec2.subprocess,
        "run",
        lambda command, **options: (aws.ssh if command[0] == "ssh" else run)(command, **options),
    )
    with moto():
        real = botocore.client.BaseClient._make_api_call

        def watched(client, operation, parameters):
            aws.calls.append(operation)
            aws.before(operation, parameters)
            if operation == "GetParameter":  # moto has other public parameters
                answer = {"Parameter": {"Value": IMAGES[parameters["Name"]]}}
            else:
                try:
                    answer = real(client, operation, parameters)
                except ClientError:
                    aws.after(operation, parameters, {})
                    raise
            if operation == "DescribeRegions":  # three of them are enough
                answer = {
                    "Regions": [{"RegionName": name} for name in ("us-east-1", "eu-west-1", "ap-south-1")]
                }
            aws.after(operation, parameters, answer)
            return answer

        monkeypatch.setattr(botocore.client.BaseClient, "_make_api_call", watched)
        yield aws


def test_the_template_is_valid():
    command = [Path(sys.executable).parent / "cfn-lint", ROOT / "support" / "ec2" / "stack.yaml"]
    checked = subprocess.run(command, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


def test_up_creates_what_it_says_and_down_leaves_nothing(aws):
    output = aws("up", "--hours", "5")
    assert "charged until `down`, for 5 h at most" in output
    assert re.search(
        r"^tiny-mnist-ada-l \(account \d+, us-east-1\): CREATE_COMPLETE, i-.* ends in 5\.0 h$", output, re.M
    )
    (instance,), client = aws.instances(), client_of("ec2")
    (group,) = aws.groups()
    (rule,) = group["IpPermissions"]
    assert (rule["IpProtocol"], rule["FromPort"], rule["ToPort"]) == ("tcp", 22, 22)
    assert [entry["CidrIp"] for entry in rule["IpRanges"]] == [f"{ADDRESS}/32"]
    assert not rule.get("Ipv6Ranges") and not rule.get("UserIdGroupPairs") and not rule.get("PrefixListIds")
    assert instance["ImageId"] == IMAGES[ec2.IMAGES["gpu"]] and instance["InstanceType"] == "g4dn.xlarge"
    assert "KeyName" not in instance and "InstanceLifecycle" not in instance
    (template,) = client.describe_launch_template_versions(Versions=["$Latest"])["LaunchTemplateVersions"]
    data = template["LaunchTemplateData"]
    assert data["MetadataOptions"]["HttpTokens"] == "required"
    template = (ROOT / "support" / "ec2" / "stack.yaml").read_text()  # moto does not know these properties
    assert "InstanceInitiatedShutdownBehavior: terminate\n" in template
    assert "SecurityGroupIds: [!GetAtt SecurityGroup.GroupId]\n" in template
    (disk,) = instance["BlockDeviceMappings"]
    assert disk["Ebs"]["DeleteOnTermination"] is True
    (volume,) = client.describe_volumes()["Volumes"]
    assert (volume["Size"], volume["VolumeType"], volume["Encrypted"]) == (100, "gp3", True)
    attribute = {"InstanceId": instance["InstanceId"], "Attribute": "userData"}
    user_data = client.describe_instance_attribute(**attribute)["UserData"]["Value"]
    user_data = base64.b64decode(user_data).decode()
    public = subprocess.check_output(["ssh-keygen", "-y", "-f", aws.folder / "key"], text=True).strip()
    assert user_data.startswith("#cloud-config\n") and f"- {public}\n" in user_data
    assert "scripts/per-boot/" in user_data and "shutdown -h +300\n" in user_data
    assert (aws.folder / "key").stat().st_mode & 0o777 == 0o600
    key = (aws.folder / "key").read_bytes()
    assert re.fullmatch(r"tiny-mnist-ada-l \(account \d+, us-east-1\): deleted\n", aws("down"))
    assert aws.left() == [] and (aws.folder / "key").read_bytes() == key


def test_down_without_a_stack_says_where_it_looked_and_deletes_nothing(aws):
    """As with another profile or region than that of `up`."""
    aws("up", "--region", "eu-west-1")
    error = aws("down")
    assert re.match(
        r"ec2: error: tiny-mnist-ada-l \(account \d+, us-east-1\) does not exist: nothing was", error
    )
    assert "DeleteStack" not in aws.calls and len(aws.instances("eu-west-1")) == 1
    assert "deleted" in aws("down", "--region", "eu-west-1") and aws.left("eu-west-1") == []


def test_all_regions_are_looked_at_and_those_that_fail_are_named_at_the_end(aws):
    aws("up", "--region", "us-east-1")

    def deny(operation, parameters):
        if operation == "DescribeStacks" and not denied:
            denied.append(True)
            raise ClientError(
                {"Error": {"Code": "AccessDenied", "Message": "by the organization"}}, operation
            )

    for command in "status", "down":
        denied = []
        aws.before = deny
        assert aws(command, "--all-regions") == f"ec2: error: `{command}` failed in ap-south-1"
    assert aws.left() == []
    output = aws("down", "--all-regions")
    assert output.count("does not exist\n") == 3


def test_the_users_of_an_account_have_stacks_of_their_own(aws, monkeypatch):
    aws("up")
    monkeypatch.setattr(ec2.getpass, "getuser", lambda: "grace")
    assert "does not exist: nothing was deleted" in aws("down")
    aws("up")
    assert {stack["StackName"] for stack in aws.stacks()} == {"tiny-mnist-ada-l", "tiny-mnist-grace"}


def test_a_new_address_is_an_update_that_keeps_the_instance(aws, monkeypatch, tmp_path):
    """Also if stack.yaml and the newest image have changed since."""
    aws("up")
    (before,) = aws.instances()
    changed = tmp_path / "changed"
    changed.mkdir()
    text = (ROOT / "support" / "ec2" / "stack.yaml").read_text().replace("shutdown -h", "shutdown -P")
    (changed / "stack.yaml").write_text(text)
    monkeypatch.setattr(ec2, "HERE", changed)
    updates = []
    aws.before = lambda operation, parameters: (
        updates.append(parameters) if operation == "UpdateStack" else None
    )
    aws.address = OTHER_ADDRESS
    assert f"SSH is open to {OTHER_ADDRESS}/32 only\n" in aws("up")
    (update,) = updates
    assert update["UsePreviousTemplate"] is True and "TemplateBody" not in update
    values = {one.pop("ParameterKey"): one for one in update["Parameters"]}
    assert values.pop("Address") == {"ParameterValue": f"{OTHER_ADDRESS}/32"}
    assert len(values) == 6 and all(value == {"UsePreviousValue": True} for value in values.values())
    (after,) = aws.instances()
    assert after["InstanceId"] == before["InstanceId"]
    (group,) = aws.groups()
    assert [[r["CidrIp"] for r in rule["IpRanges"]] for rule in group["IpPermissions"]] == [
        [f"{OTHER_ADDRESS}/32"]
    ]
    assert "UpdateStack" not in aws.calls[: aws.calls.index("UpdateStack")]


@pytest.mark.parametrize(
    "answer",
    [
        "2600:1f18::7",
        f"{ADDRESS}, {OTHER_ADDRESS}",
        "<html>Log in to the hotel</html>",
        "",
        "10.0.0.1",
        "0.0.0.0",
    ],
)
def test_an_answer_that_is_not_a_public_address_changes_nothing(aws, answer):
    aws.address = answer
    assert aws("up").startswith("ec2: error: your public IPv4 address is unknown (")
    assert aws.calls == [] and not aws.folder.exists()
    assert aws("up", "--address", answer or "x").startswith(
        "ec2: error: your public IPv4 address is unknown ("
    )
    assert f"{ADDRESS}/32" in str(aws("up", "--address", ADDRESS) and aws.stacks()[0]["Parameters"])


@pytest.mark.parametrize(
    "instance_type, image, spot",
    [
        ("c7i.large", "cpu", False),
        ("g5.xlarge", "gpu", True),
        ("c7g.large", None, False),
        ("g4ad.xlarge", None, False),
    ],
)
def test_the_image_suits_the_type_and_others_are_named_before_anything_is_created(
    aws, instance_type, image, spot
):
    if instance_type == "g4ad.xlarge":  # moto does not know it

        def after(operation, parameters, answer):
            if operation == "DescribeInstanceTypes":
                answer["InstanceTypes"][0]["GpuInfo"] = {"Gpus": [{"Manufacturer": "AMD"}]}

        aws.before = lambda operation, parameters: (
            parameters.get("InstanceTypes") and parameters.update(InstanceTypes=["g4dn.xlarge"])
        )
        aws.after = after
    output = aws("up", "--type", instance_type, *["--spot", "--zone", "us-east-1b"] * spot)
    if not image:
        assert output.startswith(f"ec2: error: {instance_type} is not supported") and aws.left() == []
        return
    (instance,) = aws.instances()
    assert instance["ImageId"] == IMAGES[ec2.IMAGES[image]] and instance["InstanceType"] == instance_type
    (template,) = client_of("ec2").describe_launch_template_versions(Versions=["$Latest"])[
        "LaunchTemplateVersions"
    ]
    assert ("InstanceMarketOptions" in template["LaunchTemplateData"]) == spot
    assert not spot or ec2.parameters(aws.stacks()[0])["Zone"] == "us-east-1b"
    assert f"is a {instance_type}: `down` first" in aws("up", "--type", "g4dn.xlarge")
    assert "ends in 8.0 h" in aws("up")  # without --type, the existing instance is kept


def test_the_end_is_moved_by_up_and_shown_by_status(aws):
    aws("up", "--hours", "8")
    commands = []
    aws.ssh = lambda command, **options: (
        commands.append(command[-1]) or subprocess.CompletedProcess(command, 0, b"", b"")
    )
    assert "ends in 3.0 h" in aws("up", "--hours", "3")
    assert commands == ["cloud-init status --wait; sudo shutdown -h +180"]
    assert re.search(r"i-\w+, g4dn.xlarge, running, 0\.0 h old, ends in 3\.0 h\n", aws("status"))
    found, instance = aws.stacks()[0], aws.instances()[0]
    instance["LaunchTime"], instance["Tags"] = datetime.now(timezone.utc) - timedelta(hours=2), []
    assert ec2.hours_left(found, instance) == pytest.approx(6, abs=0.01)
    for hours in "1h", "0", "169":
        assert aws("up", "--hours", hours) == "2"


def test_an_end_that_could_not_be_set_is_an_error(aws):
    failed = subprocess.CompletedProcess([], 1, b"", b"no shutdown")
    aws.ssh = lambda command, **options: failed
    assert aws("up").startswith("ec2: error: the end of the instance could not be set (b'no shutdown')")


def test_a_key_is_never_overwritten_and_that_of_another_computer_is_named(aws):
    aws("up")
    key = (aws.folder / "key").read_bytes()
    aws("down")
    aws("up")
    assert (aws.folder / "key").read_bytes() == key
    (aws.folder / "key").rename(aws.folder / "other")
    assert "was created on another computer: use its key, or another --name" in aws("up")
    assert len(aws.instances()) == 1


def with_status(aws, status, events=()):
    """Makes AWS report this status once it has created something, with events that have failed."""

    def after(operation, parameters, answer):
        if operation == "DescribeStacks":
            for stack in answer.get("Stacks", []):
                stack["StackStatus"] = status
        if operation == "DescribeStackEvents":
            answer["StackEvents"] = [
                {"LogicalResourceId": name, "ResourceStatus": "CREATE_FAILED", "ResourceStatusReason": reason}
                for name, reason in reversed(events)
            ]

    aws.after = after


@pytest.mark.parametrize(
    "reason, remedy",
    [
        (
            "We currently do not have sufficient g4dn.xlarge capacity",
            "try another --zone or --type, or without --spot",
        ),
        (
            "You have requested more vCPU capacity than your current quota: VcpuLimitExceeded",
            "ask for a higher vCPU",
        ),
        ("No default VPC for this user", "aws ec2 create-default-vpc"),
        ("Client.InternalError: Client error on launch (KMS)", "check the KMS key"),
        ("You are not authorized to perform iam:CreateServiceLinkedRole", "see the policy"),
        ("Something new", "Something new"),
    ],
)
def test_the_first_reason_from_aws_is_printed_with_a_remedy_and_up_repairs_the_stack(aws, reason, remedy):
    with_status(
        aws, "ROLLBACK_COMPLETE", [("Instance", reason), ("LaunchTemplate", "Resource creation cancelled")]
    )
    error = aws("up")
    assert error.startswith(f"ec2: error: create failed: Instance: {reason}") and remedy in error
    # The stack is still there, rolled back, without its instance.
    aws.untroubled()
    client_of("ec2").terminate_instances(InstanceIds=[aws.instances()[0]["InstanceId"]])
    output = aws("up")
    assert output.startswith("Replacing tiny-mnist-ada-l (account ") and len(aws.instances()) == 1
    assert len(aws.stacks()) == 1


def test_a_stack_that_cannot_be_deleted_is_an_error_with_the_resource(aws, monkeypatch):
    aws("up")
    with_status(aws, "DELETE_FAILED", [("SecurityGroup", "resource sg-1 has a dependent object")])
    monkeypatch.setattr(
        client_of("cloudformation", "us-east-1"), "delete_stack", lambda **_: None
    )  # it fails later
    assert aws("down") == "ec2: error: delete failed: SecurityGroup: resource sg-1 has a dependent object"


def test_down_does_not_trust_a_deletion_that_leaves_the_stack(aws, monkeypatch):
    aws("up")
    monkeypatch.setattr(ec2.Stack, "wait", lambda *arguments: None)
    monkeypatch.setattr(client_of("cloudformation", "us-east-1"), "delete_stack", lambda **_: None)
    assert "still exists: `down` again" in aws("down")


@pytest.mark.parametrize("state, code", [("stopped", 80), ("stopping", 64)])
def test_a_stopped_instance_is_named_and_deleted_by_down(aws, state, code):
    aws("up")

    def after(operation, parameters, answer):
        if operation == "DescribeInstances":
            for reservation in answer["Reservations"]:
                for instance in reservation["Instances"]:
                    instance["State"] = {"Name": state, "Code": code}

    aws.after = after
    assert "is stopped: start it in the AWS console, or `down`" in aws("up")
    assert f"is {state}: `up`, then `train --resume`" in aws("train")
    aws("down")
    assert aws.left() == []


def test_an_instance_that_ended_is_replaced_and_its_stack_deleted_by_down(aws):
    aws("up", "--spot")
    client_of("ec2").terminate_instances(InstanceIds=[aws.instances()[0]["InstanceId"]])
    assert "is gone: `up`, then `train --resume`" in aws("train")
    assert aws("up", "--spot").startswith("Replacing ") and len(aws.instances()) == 1
    client_of("ec2").terminate_instances(InstanceIds=[aws.instances()[0]["InstanceId"]])
    assert aws("down").endswith("deleted\n") and aws.left() == []


def test_an_instance_that_never_accepts_ssh_is_an_error_after_ten_minutes(aws):
    aws.ssh = lambda command, **options: subprocess.CompletedProcess(command, 255)
    assert aws("up").startswith("ec2: error: the connection failed")
    assert sum(aws.slept) == pytest.approx(590)


def test_errors_of_boto_are_one_line(aws):
    for error, sentence in [
        (NoCredentialsError(), "Unable to locate credentials"),
        (EndpointConnectionError(endpoint_url="https://ec2"), "Could not connect"),
        (ResponseParserError("<html>\nproxy</html>"), "<html> proxy</html>"),
        (ClientError({"Error": {"Code": "ExpiredToken", "Message": "expired"}}, "X"), "log in to AWS again"),
    ]:

        def fail(operation, parameters, error=error):
            raise error

        aws.before = fail
        message = aws("status")
        assert message.startswith("ec2: error: ") and sentence in message and "\n" not in message


LOST = EndpointConnectionError(endpoint_url="https://cloudformation")
REFUSED = ClientError({"Error": {"Code": "RequestLimitExceeded", "Message": "as AWS says"}}, "Operation")


@pytest.mark.parametrize("trouble", [REFUSED, LOST, KeyboardInterrupt()], ids=["refused", "lost", "Ctrl-C"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_after_any_call_that_fails_up_continues_and_down_leaves_nothing(aws, trouble, when):
    """Every AWS call of `up` and of `down` in turn, before it is made or before its answer arrives."""
    aws("up")
    calls = {"up": len(aws.calls)}
    aws.calls.clear()
    aws("down")
    calls["down"] = len(aws.calls)
    for command, number in calls.items():
        for last in range(1, number + 1):
            aws("up") if command == "down" else None
            aws.calls.clear()

            def fail(*_, last=last):
                if len(aws.calls) == last:
                    raise trouble

            setattr(aws, when, fail)
            message = aws(command)
            assert message.startswith(("ec2: error: ", "ec2: interrupted: ")) and "\n" not in message
            aws.untroubled()
            if last % 2:
                assert "CREATE_COMPLETE" in aws("up") and len(aws.instances()) == 1
            if aws.stacks():
                assert aws("down").endswith(": deleted\n")
            assert aws.left() == []


@pytest.mark.parametrize(
    "arguments",
    [
        ("down", "--type", "g5.xlarge"),
        ("up", "--then-down"),
        ("status", "--hours", "3"),
        ("fetch", "extra"),
        ("up", "--name", "two words"),
        ("up", "--name", "1st"),
        ("train", "--output-dir", "out"),
        ("train", "--output", "out"),
        (),
    ],
    ids=" ".join,
)
def test_a_flag_of_another_command_is_a_usage_error_and_nothing_is_called(aws, arguments):
    assert aws(*arguments) == "2" and aws.calls == []


def test_the_flags_of_train_are_passed_on_unchanged():
    for arguments, flags, then_down in [
        (["train"], [], False),
        (["train", "--resume", "--plot", "x y"], ["--resume", "--plot", "x y"], False),
        (["train", "--then-down", "--model", "all"], ["--model", "all"], True),
        (["train", "--", "--then-down", "--name", "$(x)"], ["--then-down", "--name", "$(x)"], False),
    ]:
        args = ec2.parse_args(arguments)
        assert (args.flags, args.then_down) == (flags, then_down)


def answer_with(files, sums=None):
    """An archive as `train.sh pack` writes it."""
    buffer = io.BytesIO()
    if sums is None:
        sums = "".join(f"{hashlib.sha256(content).hexdigest()}  {name}\n" for name, content in files.items())
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in [*files.items(), ("SHA256SUMS", sums.encode())]:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


@pytest.mark.parametrize(
    "name",
    [
        "../best_a.pth",
        "/../../../tmp/best_a.pth",
        "best_a.pth/x",
        ".ssh",
        "x.py",
        "train.log.sh",
        "best_é.pth",
    ],
)
def test_fetch_takes_names_of_a_fixed_form_only(aws, tmp_path, name):
    aws("up")
    content = answer_with({name: b"evil"})
    aws.ssh = lambda command, **options: subprocess.CompletedProcess(command, 0, content)
    before = sorted(tmp_path.rglob("*"))
    assert "which is not a file of a training" in aws("fetch")
    assert sorted(tmp_path.rglob("*")) == before


def test_fetch_rejects_links_truncated_archives_and_wrong_checksums(aws, tmp_path):
    aws("up")
    good = answer_with({"best_a.pth": b"weights"})
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        entry = tarfile.TarInfo("best_a.pth")
        entry.type, entry.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(entry)
    before = sorted(tmp_path.rglob("*"))
    other = "".join(hashlib.sha256(b"other").hexdigest() + "  best_a.pth\n")
    for content in (
        buffer.getvalue(),
        good[:700],
        b"",
        b"bash: no such file",
        answer_with({"best_a.pth": b"x"}, other),
    ):
        aws.ssh = lambda command, content=content, **options: subprocess.CompletedProcess(command, 0, content)
        assert aws("fetch").startswith("ec2: error: ")
        assert sorted(tmp_path.rglob("*")) == before


def test_fetch_renames_files_that_differ_and_keeps_those_that_do_not(aws):
    aws("up")
    for content in b"first", b"first", b"second":
        archive = answer_with({"best_Model_3.pth": content})
        aws.ssh = lambda command, archive=archive, **options: subprocess.CompletedProcess(command, 0, archive)
        aws("fetch")
    found = {path.name: path.read_bytes() for path in Path("ec2/tiny-mnist-ada-l").iterdir()}
    assert found == {"best_Model_3.pth": b"second", "best_Model_3.1.pth": b"first"}


def test_the_policy_suffices_and_has_no_more_than_is_needed(aws):
    (policy,) = re.findall(r"```json\n(.*?)```", GUIDE, re.DOTALL)
    (statement,) = json.loads(policy)["Statement"]
    allowed = set(statement["Action"])
    called = set()

    def note(operation, parameters):
        service = (
            "sts" if "Caller" in operation else "ssm" if operation == "GetParameter" else "cloudformation"
        )
        called.add(f"{'ec2' if operation in ec2_operations else service}:{operation}")

    ec2_operations = set(client_of("ec2").meta.service_model.operation_names)
    aws.before = note
    aws("up", "--spot")
    aws.address = OTHER_ADDRESS
    aws("up")
    with_status(aws, "ROLLBACK_COMPLETE")
    aws("up", "--name", "other")
    aws.after = lambda *arguments: None
    aws("status")
    aws("down", "--all-regions")
    by_cloudformation = {  # its calls in the user's name, for three kinds of resources
        "ec2:CreateSecurityGroup",
        "ec2:AuthorizeSecurityGroupIngress",
        "ec2:RevokeSecurityGroupIngress",
        "ec2:RevokeSecurityGroupEgress",
        "ec2:DeleteSecurityGroup",
        "ec2:DescribeSecurityGroups",
        "ec2:CreateLaunchTemplate",
        "ec2:DeleteLaunchTemplate",
        "ec2:DescribeLaunchTemplates",
        "ec2:DescribeLaunchTemplateVersions",
        "ec2:RunInstances",
        "ec2:TerminateInstances",
        "ec2:DescribeVolumes",
        "ec2:DescribeInstanceStatus",
        "iam:CreateServiceLinkedRole",  # the first spot instance of an account
    }
    assert statement["Effect"] == "Allow" and allowed == called | by_cloudformation


def test_the_guide_names_each_command_and_flag(capsys):
    for command in ec2.COMMANDS:
        with pytest.raises(SystemExit):
            ec2.parse_args([command, "--help"])
        for flag in set(re.findall(r"--[a-z-]+", capsys.readouterr().out)) - {"--help"}:
            assert f"`{flag}" in GUIDE or f" {flag}" in GUIDE, flag


def write_script(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def wait_until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def answers(port):
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}{os.pathsep}/usr/sbin"
MISSING = [
    program for program in ("sshd", "ssh-keygen", "setsid", "flock") if not shutil.which(program, path=PATH)
]


@pytest.fixture
def instance(request, aws, tmp_path, monkeypatch, small_data):
    """The home directory of an instance: a local sshd, to which `ssh` connects in place of EC2's address."""
    if MISSING:
        pytest.skip(f"needs {', '.join(MISSING)}: see .ci/run")
    remote = tmp_path / "remote"
    programs = remote / "programs"
    programs.mkdir(parents=True)
    aws("up", "--type", getattr(request, "param", "c7i.large"))  # without a GPU
    public = subprocess.check_output(["ssh-keygen", "-y", "-f", aws.folder / "key"], text=True)
    (remote / "authorized_keys").write_text(public)
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", remote / "host_key"], check=True)
    write_script(programs / "sudo", f'echo "$@" >> {remote / "sudo"}')  # apt-get is not to be run here
    write_script(programs / "cloud-init", "exit 0")
    write_script(programs / "login", f'cd {remote} && eval "$SSH_ORIGINAL_COMMAND"')
    (programs / "python3").symlink_to(sys.executable)
    packages = [path for path in sys.path if path.endswith("site-packages")]
    environment = {
        "HOME": remote,
        "PATH": f"{programs}{os.pathsep}{PATH}",
        "PYTHONPATH": os.pathsep.join(packages),  # so that pip finds the requirements
        "PIP_NO_INDEX": 1,
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
    user = subprocess.check_output(["id", "-un"], text=True).strip()

    def ssh(command, **options):
        options_here = ["-o", f"Port={port}", "-o", f"User={user}", "-o", "HostName=127.0.0.1"]
        process = subprocess.Popen(["ssh", *options_here, *command[1:]], **popen(options))
        output, errors = process.communicate(options.get("input"))
        return subprocess.CompletedProcess(command, process.returncode, output, errors)

    def popen(options):
        kept = {key: value for key, value in options.items() if key in ("cwd", "stdout", "stderr")}
        if options.get("capture_output"):
            kept |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return kept | ({"stdin": subprocess.PIPE} if "input" in options else {})

    aws.ssh = ssh
    pause = threading.Event()
    monkeypatch.setattr(ec2.time, "sleep", lambda seconds: pause.wait(0.2))
    clone = tmp_path / "clone"
    left_out = shutil.ignore_patterns(".git", ".venv", "*.pth", "__pycache__", "MNIST", "tests")
    shutil.copytree(ROOT, clone, ignore=left_out)
    shutil.copytree(small_data / "MNIST", clone / "data" / "MNIST")
    monkeypatch.setattr(ec2, "PROJECT", clone)
    yield remote
    server.terminate()
    server.wait()
    subprocess.run(["pkill", "-f", str(remote)], check=False)


@pytest.fixture
def installed(instance):
    """An instance on which `train.sh` has nothing to install."""
    (instance / "mnist" / "venv" / "bin").mkdir(parents=True)
    (instance / "mnist" / "venv" / "bin" / "python").symlink_to(sys.executable)
    (instance / "mnist" / "ready").touch()
    return instance


FLAGS = "--model", "Model_1", "--device", "cpu"
FOLDER = Path("ec2/tiny-mnist-ada-l")


def test_a_training_survives_its_connection_and_its_files_are_fetched_and_resumed(aws, instance, monkeypatch):
    log = instance / "mnist" / "out" / "train.log"

    def interrupt():
        wait_until(lambda: log.exists() and "Epoch: 2/" in log.read_text())
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    assert aws("train", *FLAGS, "--epochs", 70).startswith("ec2: interrupted: a training")
    # A second one is not started while it runs, and fetching beside it gives whole files of one moment.
    assert aws("train", *FLAGS).endswith("nothing was started (see above)")
    for _ in range(3):
        aws("fetch")
        assert all(saved_states(FOLDER).values())
    assert "Epoch: 70/" not in log.read_text()
    wait_until(lambda: (instance / "mnist" / "status").exists(), 120)
    assert (instance / "mnist" / "status").read_text() == "0\n"
    apt = (instance / "sudo").read_text()
    assert "apt-get -qy -o DPkg::Lock::Timeout=300 install python3-venv" in apt
    output = aws("fetch")
    assert f"{FOLDER}/train.log: " in output and (FOLDER / "train.log").read_text() == log.read_text()
    assert isinstance(checkpoint.load(FOLDER / "best_Model_1.pth"), models.Model_1)

    # After the instance was terminated, another one resumes from the fetched files.
    shutil.rmtree(instance / "mnist")
    output = aws("train", *FLAGS, "--epochs", 71, "--resume")
    assert "Resuming from last_Model_1.pth (epoch 70)\n" in output and "Epoch: 71/71" in output
    # The fetched files do not replace newer states.
    output = aws("train", *FLAGS, "--epochs", 72, "--resume")
    assert "Resuming from last_Model_1.pth (epoch 71)\n" in output
    assert aws("ssh", "echo", "$(false) from there") == "0"


def test_the_status_of_a_training_is_that_of_train_py(aws, installed):
    assert aws("train", *FLAGS, "--epochs", 1, "--data-dir", "$(touch evil) 'x y'", "--then-down") == "1"
    log = (installed / "mnist" / "out" / "train.log").read_text()
    assert "$(touch evil) 'x y': no such directory" in log and not list(installed.rglob("evil"))
    assert len(aws.instances()) == 1  # a failed training is not ended, nor lost
    assert aws("train", "--frobnicate") == "2"
    output = aws("train", *FLAGS, "--epochs", 1, "--then-down")
    assert "Test Accuracy: " in output and output.endswith(": deleted\n")
    assert (FOLDER / "best_Model_1.pth").exists() and aws.left() == []


def test_a_failed_upload_starts_nothing_and_keeps_the_project(aws, installed, monkeypatch):
    aws("train", *FLAGS, "--epochs", 1)
    before = (installed / "mnist" / "project" / "train.py").read_text()
    monkeypatch.setattr(ec2, "archive", lambda folder: b"cut off")
    assert aws("train", *FLAGS, "--epochs", 1).endswith("nothing was started (see above)")
    assert (installed / "mnist" / "project" / "train.py").read_text() == before


def test_another_host_at_the_same_address_is_not_connected_to(aws, instance):
    aws("ssh", "true")
    known = (aws.folder / "known_hosts").read_text()
    assert known.startswith(f"{aws.instances()[0]['InstanceId'].lower()} ssh-ed25519 ")
    other = subprocess.check_output(["ssh-keygen", "-y", "-f", aws.folder / "key"], text=True)
    (aws.folder / "known_hosts").write_text(f"{known.split()[0]} {other}")
    assert aws("ssh", "true").startswith("ec2: error: the connection failed")


def test_a_script_with_windows_line_ends_is_sent_with_those_of_linux(aws, installed, monkeypatch, tmp_path):
    (tmp_path / "windows").mkdir()
    script = (ROOT / "support" / "ec2" / "train.sh").read_bytes().replace(b"\n", b"\r\n")
    (tmp_path / "windows" / "train.sh").write_bytes(script)
    monkeypatch.setattr(ec2, "HERE", tmp_path / "windows")
    assert "Test Accuracy: " in aws("train", *FLAGS, "--epochs", 1)


@pytest.mark.parametrize("instance", ["g4dn.xlarge"], indirect=True)
def test_a_gpu_that_pytorch_cannot_use_is_named_before_training(aws, installed):
    assert aws("train", *FLAGS).endswith("nothing was started (see above)")
    assert not (installed / "mnist" / "out" / "train.log").exists()


def test_fetching_before_a_training_is_a_one_line_error(aws, instance):
    assert aws("fetch") == "ec2: error: there is nothing to fetch yet"
    assert not FOLDER.exists()
