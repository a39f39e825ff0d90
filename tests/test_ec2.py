"""support/ec2: the template, and the bash lines of its page against moto and a local OpenSSH server."""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conftest import ROOT

pty = pytest.importorskip("pty")
boto3, cfn_yaml, moto, yaml = map(
    pytest.importorskip, ("boto3", "cfnlint.decode.cfn_yaml", "moto.server", "yaml")
)
FOLDER = ROOT / "support" / "ec2"
LINES = "".join(
    re.findall(r"^```sh\n(.*?)^```", (FOLDER / "README.md").read_text(), re.DOTALL | re.MULTILINE)
)
TEMPLATE = cfn_yaml.load(FOLDER / "stack.yaml")
RESOURCES = {name: resource["Properties"] for name, resource in TEMPLATE["Resources"].items()}
PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin"
KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJ8pZ4ZcWjT5pQ8o6yQ0m3p1X8b6qg3mJrV0mJw2a9bC ada@home"
TRAIN = "import time; open('out/last_Model_3.pth', 'w').write(str(time.time())); time.sleep(0.1)\n"


def line(start):
    """Returns the one line of the page that begins with this."""
    (found,) = [line for line in LINES.splitlines() if line.startswith(start)]
    return found


def test_a_deployment_never_replaces_the_instance_nor_ignores_a_parameter():
    """As CloudFormation documents its updates, which moto does not simulate."""
    command = [sys.executable, "-m", "cfnlint", FOLDER / "stack.yaml"]
    assert subprocess.run(command, capture_output=True, text=True).stdout == ""
    # No property of the instance depends on a parameter or on the newest image.
    launch = {"LaunchTemplateId": {"Ref": "LaunchTemplate"}, "Version": "1"}
    tags = [{"Key": "Name", "Value": {"Ref": "AWS::StackName"}}]
    assert RESOURCES["Instance"] == {"LaunchTemplate": launch, "Tags": tags}
    assert TEMPLATE["Outputs"] == {"Address": {"Value": {"Fn::GetAtt": ["Instance", "PublicIp"]}}}
    assert {one["Type"] for one in TEMPLATE["Parameters"].values()} == {"String", "Number"}
    # A resource with a name is never replaced, so a new key or a new description is an error.
    group = RESOURCES["SecurityGroup"]
    assert group["GroupName"] == RESOURCES["KeyPair"]["KeyName"] == {"Ref": "AWS::StackName"}
    guarded = set(re.findall(r"\$\{(\w+)\}", group["GroupDescription"]["Fn::Sub"]))
    assert guarded | {"PublicKey", "Address"} == TEMPLATE["Parameters"].keys()


def test_the_instance_is_private_and_terminates_itself_after_each_boot():
    data = RESOURCES["LaunchTemplate"]["LaunchTemplateData"]
    disk = data["BlockDeviceMappings"][0]["Ebs"]
    assert disk["Encrypted"] is disk["DeleteOnTermination"] is True
    assert data["MetadataOptions"] == {"HttpTokens": "required"}
    (interface,) = data["NetworkInterfaces"]
    groups = [{"Fn::GetAtt": ["SecurityGroup", "GroupId"]}]
    assert interface == {"DeviceIndex": 0, "AssociatePublicIpAddress": True, "Groups": groups}
    assert data["KeyName"] == {"Ref": "KeyPair"}
    assert RESOURCES["KeyPair"]["PublicKeyMaterial"] == {"Ref": "PublicKey"}
    nothing = {"Ref": "AWS::NoValue"}
    assert data["Placement"]["Fn::If"] == ["HasZone", {"AvailabilityZone": {"Ref": "Zone"}}, nothing]
    assert data["InstanceMarketOptions"]["Fn::If"] == ["IsSpot", {"MarketType": "spot"}, nothing]
    images = [re.findall(r"deeplearning|canonical|24\.04", image) for image in data["ImageId"]["Fn::If"][1:]]
    assert images == [["deeplearning", "24.04"], ["canonical", "24.04"]]
    assert data["InstanceInitiatedShutdownBehavior"] == "terminate"
    user_data = data["UserData"]["Fn::Base64"]["Fn::Sub"]
    (script,) = yaml.safe_load(user_data)["write_files"]
    assert user_data.startswith("#cloud-config\n") and script["content"].startswith("#!/bin/sh\n")
    assert script["path"].startswith("/var/lib/cloud/scripts/per-boot/")  # cloud-init runs these at each boot
    assert script["permissions"] == "0755"
    command = script["content"].replace("${Hours}", "8").replace("shutdown", "echo")
    assert subprocess.check_output(["sh", "-c", command], text=True) == "-h +480\n"


def test_the_defaults_cost_what_the_page_says_and_open_one_port():
    defaults = {name: parameter.get("Default") for name, parameter in TEMPLATE["Parameters"].items()}
    choices = {"InstanceType": "g4dn.xlarge", "Hours": 8, "Spot": "false", "Zone": ""}
    assert defaults == {"Address": None, "PublicKey": None} | choices
    assert TEMPLATE["Parameters"]["Hours"]["MinValue"] == 1
    types = TEMPLATE["Parameters"]["InstanceType"]
    assert types["AllowedValues"] == ["g4dn.xlarge", "g5.xlarge", "g6.xlarge", "c7i.large"]
    assert all(name in types["ConstraintDescription"] for name in types["AllowedValues"])
    assert TEMPLATE["Parameters"]["Spot"]["AllowedValues"] == ["true", "false"]
    port = {"IpProtocol": "tcp", "FromPort": 22, "ToPort": 22, "CidrIp": {"Ref": "Address"}}
    assert RESOURCES["SecurityGroup"]["SecurityGroupIngress"] == [port]
    data = RESOURCES["LaunchTemplate"]["LaunchTemplateData"]
    disk = data["BlockDeviceMappings"][0]
    assert disk["DeviceName"] == "/dev/sda1"
    assert (disk["Ebs"]["VolumeSize"], disk["Ebs"]["VolumeType"]) == (100, "gp3")
    assert (data["ImageId"]["Fn::If"][0], data["InstanceType"]) == ("HasGPU", {"Ref": "InstanceType"})
    assert TEMPLATE["Conditions"] == {
        "HasGPU": {"Fn::Not": [{"Fn::Equals": [{"Ref": "InstanceType"}, "c7i.large"]}]},
        "HasZone": {"Fn::Not": [{"Fn::Equals": [{"Ref": "Zone"}, ""]}]},
        "IsSpot": {"Fn::Equals": [{"Ref": "Spot"}, "true"]},
    }


WRONG = {
    "Address": ["203.0.113.7", "0.0.0.0/0", "256.1.1.1/32", "1.2.3.4.5/32"],
    "PublicKey": ["", KEY[12:], f"ssh-dss {KEY[12:]}"],
}


@pytest.mark.parametrize("name, right", [("Address", "203.0.113.7/32"), ("PublicKey", KEY)])
def test_a_wrong_address_or_key_is_refused_with_a_sentence(name, right):
    parameter = TEMPLATE["Parameters"][name]  # CloudFormation matches the whole value; moto does not check it
    matches = [value for value in [right, *WRONG[name]] if re.fullmatch(parameter["AllowedPattern"], value)]
    assert re.fullmatch(parameter["AllowedPattern"], right.replace("ed25519", "rsa"))
    assert matches == [right] and parameter["ConstraintDescription"].startswith("must be ")


@pytest.fixture
def bash(tmp_path):
    """Runs a line in a stand-in project directory, with tmp_path/home as home directory."""
    project = tmp_path / "project"
    for folder in "home/.ssh", "bin", "raw", "project/.git", "project/out", "project/data/MNIST":
        (tmp_path / folder).mkdir(parents=True)
    (project / "data" / "MNIST" / "raw").symlink_to(tmp_path / "raw")
    (project / "requirements.txt").touch()
    (project / "train.py").write_text(f"while True:\n    {TRAIN}")
    shutil.copytree(FOLDER, project / "support" / "ec2")
    stack = project / "support" / "ec2" / "stack.yaml"
    own_image = 'Version: "1"}\n      ImageId: ami-12c6146b'  # as moto's instances read no launch template
    stack.write_text(stack.read_text().replace('Version: "1"}', own_image))
    variables = {"HOME": f"{tmp_path}/home", "PATH": f"{tmp_path}/bin:{PATH}", "TERM": "xterm"}
    variables |= dict.fromkeys(["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"], "testing")

    def run(command, function=subprocess.run, **options):
        options = options or {"capture_output": True, "text": True}
        return function(["bash", "-c", command], cwd=project, env=os.environ | variables, **options)

    return run


def stand_in(folder, name, content):
    (folder / "bin" / name).write_text(f"#!/bin/bash\n{content}\n")
    (folder / "bin" / name).chmod(0o755)


@pytest.mark.filterwarnings("ignore:Tried to parse AWS..EC2..KeyPair", "ignore:.*does not match an error")
def test_the_stack_is_created_opened_to_another_address_and_deleted(bash, tmp_path, monkeypatch):
    server = moto.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    endpoint = f"http://127.0.0.1:{server.get_host_and_port()[1]}"
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    (tmp_path / "home" / ".ssh" / "tiny-mnist.pub").write_text(KEY)
    two_of_seventeen = '[ $2 = describe-regions ] && set -- "$@" --region-names us-east-1 eu-west-1'
    stand_in(tmp_path, "aws", f'{two_of_seventeen}; exec {shutil.which("aws", path=PATH)} "$@"')
    keys = {"aws_access_key_id": "testing", "aws_secret_access_key": "testing"}
    client = boto3.client("ec2", "us-east-1", endpoint_url=endpoint, **keys)

    def deploy(address):
        stand_in(tmp_path, "curl", f"echo {address}")
        return bash(line("aws cloudformation deploy"))

    def addresses():
        name = {"Name": "group-name", "Values": ["tiny-mnist"]}
        groups = client.describe_security_groups(Filters=[name])["SecurityGroups"]
        rules = [rule for group in groups for rule in group["IpPermissions"]]
        return [address["CidrIp"] for rule in rules for address in rule["IpRanges"]]

    def instances():
        running = {"Name": "instance-state-name", "Values": ["running"]}
        found = client.describe_instances(Filters=[running])["Reservations"]
        return [one["Instances"][0]["InstanceId"] for one in found]

    assert deploy("203.0.113.7").returncode == 0 and addresses() == ["203.0.113.7/32"]
    (instance,) = instances()
    assert bash(line("for region in")).stdout.split()[:2] == ["us-east-1", instance]
    assert deploy("198.51.100.9").returncode == 0 and addresses() == ["198.51.100.9/32"]
    assert instances() == [instance]
    assert bash(line("aws cloudformation describe-stack-events")).returncode == 0
    assert bash(line("aws cloudformation delete")).returncode == 0
    assert addresses() == instances() == []
    refused = deploy("300.1.1.1")
    assert refused.returncode != 0 and "300.1.1.1" in refused.stderr
    server.stop()


def test_training_survives_a_lost_connection_and_a_download_overwrites_nothing(bash, tmp_path):
    if missing := [program for program in ("sshd", "tmux") if not shutil.which(program, path=PATH)]:
        pytest.skip(f"needs {' and '.join(missing)}")
    remote, keys = tmp_path / "remote", tmp_path / "home" / ".ssh"
    remote.mkdir()
    assert bash(f"{line('ssh-keygen')} -N '' && ssh-keygen -t ed25519 -N '' -f {remote}/key").returncode == 0
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    stand_in(tmp_path, "sudo", "")
    stand_in(tmp_path, "login", f'cd {remote}; exec bash -c "$SSH_ORIGINAL_COMMAND"')
    (remote / "config").write_text(
        f"ListenAddress 127.0.0.1:{port}\nHostKey {remote}/key\nPidFile none\nStrictModes no\nUsePAM no\n"
        f"AuthorizedKeysFile {keys}/tiny-mnist.pub\nForceCommand {tmp_path}/bin/login\n"
        f"Subsystem sftp {shutil.which('sftp-server', path='/usr/lib/openssh:/usr/libexec/openssh')}\n"
        f'SetEnv "PATH={tmp_path}/bin:{PATH}" HOME={remote} TMUX_TMPDIR={remote} SHELL=/bin/bash\n'
    )
    for program in "ssh", "scp":  # the address and the user of an instance are those of this server
        options = f"-o HostName=127.0.0.1 -o Port={port} -o UserKnownHostsFile={keys}/known"
        stand_in(tmp_path, program, f'exec {shutil.which(program)} {options} "${{@/ubuntu@/}}"')
    Path("/run/sshd").mkdir(exist_ok=True)
    server = subprocess.Popen([shutil.which("sshd", path=PATH), "-D", "-e", "-f", remote / "config"])

    address, project = "address=instance; ", remote / "tiny-mnist"
    copied = bash(f"{address} {line('tar ')} && {line('scp ')}")
    assert copied.returncode == 0, copied.stderr
    terminal, stdin = pty.openpty()
    client = bash(address + line("ssh -i"), subprocess.Popen, stdin=stdin, stdout=stdin)
    os.write(terminal, f"{line('sudo apt')}\n{line('python3 -m venv')}\n".encode())
    last = project / "out" / "last_Model_3.pth"
    while not last.exists():
        time.sleep(0.1)
    client.kill()
    killed = time.time()
    while float(last.read_text() or 0) < killed:
        time.sleep(0.1)
    assert (project / "data" / "MNIST" / "raw").is_dir() and not (project / ".git").exists()

    fetched = tmp_path / "project" / "fetched" / last.name
    done = bash(address + line("mkdir fetched"))
    assert done.returncode == 0 and fetched.exists(), done.stderr
    fetched.write_text("mine")
    assert bash(address + line("mkdir fetched")).returncode != 0 and fetched.read_text() == "mine"
    bash(f"TMUX_TMPDIR={remote} tmux kill-server")
    server.terminate()
