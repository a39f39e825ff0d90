"""An EC2 instance to train on, from nothing to nothing.

    python -m support.ec2 up               # key, firewall, image, instance: ready to log in
    python -m support.ec2 train --resume   # train.py's own flags; follows the log
    python -m support.ec2 fetch            # the models and the log, compared by checksum
    python -m support.ec2 down             # everything gone, and shown to be gone

It needs boto3 and `ssh`, not PyTorch. All that it makes in EC2 carries one tag; all that it keeps here is in
`~/.tiny-mnist`, where the region is noted before anything is made, so that any later command finds it.
"""

import argparse
import contextlib
import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
import tarfile
import tempfile
import urllib.request
from pathlib import Path

try:
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, NoRegionError
except ImportError as error:
    sys.exit(f"ec2: error: this needs boto3: pip install boto3 ({error})")

PROJECT = Path(__file__).resolve().parent.parent
SENT = "train.py", "evaluate.py", "datafile.py", "requirements.txt", "models", "support", "data"
TAG = "tiny-mnist"
ADDRESS_URL = "https://checkip.amazonaws.com"
GPU_IMAGE = "amazon", "Deep Learning OSS Nvidia Driver AMI GPU PyTorch * (Ubuntu *) *"
CPU_IMAGE = "099720109477", "ubuntu/images/hvm-ssd-gp3/ubuntu-noble-24.04-amd64-server-*"
REMEDIES = {  # for the codes of EC2's errors, what is wrong and what to do
    "AuthFailure InvalidClientTokenId SignatureDoesNotMatch": "AWS refuses your credentials",
    "ExpiredToken ExpiredTokenException RequestExpired": "your AWS credentials have expired: log in again",
    "UnauthorizedOperation AccessDenied": "your AWS user may not {operation}: see the policy in README.md",
    "VcpuLimitExceeded MaxSpotInstanceCountExceeded": "your account's quota of vCPUs is too small: ask for "
    "more under Service Quotas, Amazon EC2, or take a smaller --type",
    "InsufficientInstanceCapacity Unsupported SpotMaxPriceTooLow": "there is no capacity: try another "
    "--zone, another --type, or with or without --spot",
    "VPCIdNotSpecified DefaultVpcDoesNotExist": "there is no default VPC: `aws ec2 create-default-vpc`",
}


class Problem(Exception):
    """What keeps a command from its end, in one sentence, with what to do."""


class Place:
    """What there is of a name: in one region of EC2, and in a folder here."""

    def __init__(self, name, region=None):
        self.name, self.folder = name, Path.home() / ".tiny-mnist" / name
        files = "notes.json", "key.pem", "ssh_config", "known_hosts", "lock"
        self.path, self.key, self.config, self.known_hosts, self.lock = (self.folder / file for file in files)
        self.notes = json.loads(self.path.read_text()) if self.path.exists() else {}
        session = boto3.Session(region_name=region or self.notes.get("region"))
        self.ec2 = session.resource("ec2", config=Config(retries={"mode": "standard", "max_attempts": 5}))
        self.client, self.region = self.ec2.meta.client, self.ec2.meta.client.meta.region_name
        self.tag, self.mine = {"Key": TAG, "Value": name}, [{"Name": f"tag:{TAG}", "Values": [name]}]

    def note(self, **notes):
        """Writes down what is, or is about to be; the file is replaced as a whole."""
        self.notes |= notes
        self.path.with_suffix(".tmp").write_text(json.dumps(self.notes))
        self.path.with_suffix(".tmp").replace(self.path)

    def key_state(self):
        """Of the key's file: None where there is none, "ours", "begun" and no more, or "foreign"."""
        digest = hashlib.sha256(self.key.read_bytes()).hexdigest() if self.key.exists() else None
        return digest and {digest: "ours", "begun": "begun"}.get(self.notes.get("key"), "foreign")

    def forget(self):
        """Deletes what these steps have written here, and nothing else."""
        keys = [self.key] if self.key_state() in ("ours", "begun") else []
        others = self.config, self.known_hosts, self.lock, self.path.with_suffix(".tmp"), self.path
        for path in *keys, *others:
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # it holds something else, or never was
            self.folder.rmdir()

    def tags(self, *kinds):
        return [{"ResourceType": kind, "Tags": [self.tag]} for kind in kinds]

    def instances(self):
        found = self.ec2.instances.filter(Filters=self.mine)
        return [instance for instance in found if instance.state["Name"] != "terminated"]

    def called(self, collection, filter_name):
        """The key pairs or security groups of this name; Problem where one is not of these steps."""
        found = list(collection.filter(Filters=[{"Name": filter_name, "Values": [self.name]}]))
        if any(self.tag not in (thing.tags or []) for thing in found):
            raise Problem(f"something in EC2 is called {self.name!r} already: choose another --name")
        return found

    def left(self):
        """The ids of everything of this name in EC2."""
        kinds = self.ec2.security_groups, self.ec2.volumes, self.ec2.key_pairs
        things = [thing for kind in kinds for thing in kind.filter(Filters=self.mine)]
        return [getattr(thing, "id", None) or thing.key_pair_id for thing in self.instances() + things]


def make_key(place):
    """Has EC2 make a key pair, whose private half nobody else can read at any moment."""
    pairs, state = place.called(place.ec2.key_pairs, "key-name"), place.key_state()
    if pairs and state == "ours":
        return
    if state == "foreign":
        raise Problem(f"{place.key} was not written by these steps: move it away")
    if place.instances() or (pairs and "key" not in place.notes):
        raise Problem("the key of what is in EC2 is not here: `down`, then `up` again")
    for pair in pairs:  # of an `up` that was interrupted
        pair.delete()
    place.note(key="begun")
    place.key.unlink(missing_ok=True)
    with os.fdopen(os.open(place.key, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as file:
        options = {"KeyType": "ed25519", "TagSpecifications": place.tags("key-pair")}
        file.write(place.ec2.create_key_pair(KeyName=place.name, **options).key_material)
    place.note(key=hashlib.sha256(place.key.read_bytes()).hexdigest())


def make_firewall(place):
    """Lets SSH in from the address that this computer has now, and nothing else; returns the group's id."""
    groups = place.called(place.ec2.security_groups, "group-name")
    if not groups:
        options = {"GroupName": place.name, "Description": "SSH from one address"}
        options |= {"TagSpecifications": place.tags("security-group")}
        groups = [place.ec2.create_security_group(**options)]
        place.client.get_waiter("security_group_exists").wait(GroupIds=[groups[0].id])
    group = groups[0]
    with urllib.request.urlopen(ADDRESS_URL, timeout=10) as answer:
        ranges = [{"CidrIp": f"{answer.read().decode().strip()}/32"}]
    wanted = {"IpProtocol": "tcp", "FromPort": 22, "ToPort": 22, "IpRanges": ranges}
    rules = [{key: value for key, value in rule.items() if value} for rule in group.ip_permissions]
    if rules != [wanted]:
        if rules:
            group.revoke_ingress(IpPermissions=rules)
        group.authorize_ingress(IpPermissions=[wanted])
        print(f"SSH is open to {ranges[0]['CidrIp']} alone")
    return group.id


def make_instance(place, group, args):
    """Starts an instance of the newest image, its disk encrypted; a shutdown ends both. Returns it."""
    owner, name = GPU_IMAGE if args.type[0] in "gp" else CPU_IMAGE
    filters = {"name": name, "architecture": "x86_64", "state": "available"}.items()
    filters = [{"Name": key, "Values": [value]} for key, value in filters]
    images = list(place.ec2.images.filter(Owners=[owner], Filters=filters))
    if not images:
        raise Problem(f"{place.region} has no image {name!r}: choose another --region")
    image = max(images, key=lambda image: image.creation_date)
    disk = {"VolumeSize": 100, "VolumeType": "gp3", "Encrypted": True, "DeleteOnTermination": True}
    options = {"InstanceMarketOptions": {"MarketType": "spot"}} if args.spot else {}
    options |= {"Placement": {"AvailabilityZone": args.zone}} if args.zone else {}
    options |= {"ImageId": image.id, "InstanceType": args.type, "MinCount": 1, "MaxCount": 1}
    options |= {"BlockDeviceMappings": [{"DeviceName": image.root_device_name, "Ebs": disk}]}
    options |= {"MetadataOptions": {"HttpTokens": "required", "HttpEndpoint": "enabled"}}
    options |= {"InstanceInitiatedShutdownBehavior": "terminate", "KeyName": place.name}
    options |= {"SecurityGroupIds": [group], "TagSpecifications": place.tags("instance", "volume")}
    return place.ec2.create_instances(**options)[0]


def connect(place):
    """Opens the firewall to this computer, writes ssh's configuration and returns the instance."""
    running = [one for one in place.instances() if one.public_ip_address]
    if not running:
        raise Problem(
            f"no instance {place.name!r} runs in {place.region}. A spot instance that was taken away is gone "
            "with its disk: `up` again, then `train --resume` sends what was fetched and goes on"
        )
    make_firewall(place)
    if place.notes.get("instance") != running[0].id:
        place.known_hosts.unlink(missing_ok=True)  # of another instance
        place.note(instance=running[0].id)
    place.config.write_text(
        f"Host {place.name}\n HostName {running[0].public_ip_address}\n User ubuntu\n"
        f' IdentityFile "{place.key}"\n IdentitiesOnly yes\n UserKnownHostsFile "{place.known_hosts}"\n'
        " StrictHostKeyChecking accept-new\n ServerAliveInterval 30\n ConnectTimeout 30\n LogLevel ERROR\n"
    )
    return running[0]


def up(place, args):
    """Makes what is missing, and waits until one can log in."""
    make_key(place)
    group = make_firewall(place)
    instance = (place.instances() or [None])[0] or make_instance(place, group, args)
    print(f"{instance.id} in {place.region} costs from now until `down`")
    place.client.get_waiter("instance_status_ok").wait(InstanceIds=[instance.id])
    connect(place)
    print("ready")


def ssh(place, *command, check=False, **options):
    """Runs a command on the instance; Problem where the connection or, with `check`, the command fails."""
    ended = subprocess.run(["ssh", "-F", place.config, place.name, *command], **options)
    if ended.returncode == 255 or (check and ended.returncode):
        raise Problem("the connection failed: try again in a minute, or look at `status`")
    return ended


def train(place, args):
    """Sends the project, and what was fetched, and has ec2_train.sh train there; follows the log."""
    gpu = "gpu" if connect(place).instance_type[0] in "gp" else ""
    files = [(PROJECT / name, name) for name in SENT]
    files += [(path, f"fetched/{path.name}") for path in args.to.glob("*.pth")]
    with tempfile.TemporaryFile() as file:
        with tarfile.open(fileobj=file, mode="w:gz") as tar:
            for path, name in files:
                tar.add(path, name, filter=lambda entry: None if "__pycache__" in entry.name else entry)
        file.seek(0)
        ssh(place, "mkdir -p mnist && tar -xzf - -C mnist", stdin=file, check=True)
    command = "bash", "mnist/support/ec2_train.sh", gpu, args.shutdown or "", *args.flags
    try:
        status = ssh(place, shlex.join(command)).returncode
    except KeyboardInterrupt:
        print("\nthe training goes on: `train` follows it again, `fetch` brings what is there")
        return
    if status:
        reason = "PyTorch cannot use the GPU" if status == 42 else "see above"
        raise Problem(f"nothing was trained ({reason}): `ssh` to look, or `down`")


def fetch(place, args):
    """Copies the models, the training states and the log, each compared with its checksum there."""
    connect(place)
    listed = ssh(place, "cd mnist && sha256sum *.pth train.log", stdout=subprocess.PIPE, text=True).stdout
    args.to.mkdir(parents=True, exist_ok=True)
    for digest, name in map(str.split, listed.splitlines()):
        content = ssh(place, f"cat mnist/{shlex.quote(name)}", stdout=subprocess.PIPE).stdout
        if hashlib.sha256(content).hexdigest() != digest:
            raise Problem(f"{name} changed while it was copied: `fetch` again")
        (args.to / f".{name}.tmp").write_bytes(content)
        (args.to / f".{name}.tmp").replace(args.to / name)
        print(f"{args.to / name}: {len(content):,} bytes, same checksum")
    if not listed:
        raise Problem("there is nothing to fetch yet")


def down(place, args):
    """Ends everything of this name, waits until EC2 confirms it, and forgets what is here last of all."""
    regions = [place.region]
    if args.all_regions:
        regions = [region["RegionName"] for region in place.client.describe_regions()["Regions"]]
    for there in (Place(place.name, region) for region in regions):
        before, instances = there.left(), there.instances()
        for instance in instances:
            instance.terminate()
        for instance in instances:
            instance.wait_until_terminated()
        if volumes := [volume.id for volume in there.ec2.volumes.filter(Filters=there.mine)]:
            there.client.get_waiter("volume_deleted").wait(VolumeIds=volumes)  # with their instances
        for kind in there.ec2.security_groups, there.ec2.key_pairs:
            for thing in kind.filter(Filters=there.mine):
                thing.delete()
        if still := there.left():
            raise Problem(f"{there.region} still has {', '.join(still)}: `down` again in a minute")
        print(f"{there.region}: ended {', '.join(before) or 'nothing'}; nothing is left")
    place.forget()


def status(place, args):
    """Prints what there is in EC2."""
    states = [f"{instance.id} is {instance.state['Name']}" for instance in place.instances()]
    print(f"{place.region}: {', '.join(states + place.left()) or 'nothing'}")


def log_in(place, args):
    """Opens a terminal on the instance, or runs a command there."""
    connect(place)
    sys.exit(ssh(place, *args.flags).returncode)


COMMANDS = {"up": up, "train": train, "fetch": fetch, "down": down, "status": status, "ssh": log_in}


def sentence(error):
    """What an error means that AWS's library raises, and what to do."""
    if isinstance(error, (NoCredentialsError, NoRegionError)):
        return f"`aws configure` was not done ({error})"
    if isinstance(error, ClientError):
        code, operation = error.response["Error"]["Code"], error.operation_name
        remedies = [text for codes, text in REMEDIES.items() if code in codes.split()]
        remedy = (remedies or ["{operation} failed"])[0]
        return f"{remedy.format(operation=operation)} ({code}: {error.response['Error']['Message']})"
    return " ".join(str(error).split())


def parse_args(arguments):
    parser = argparse.ArgumentParser(prog="python -m support.ec2", allow_abbrev=False)
    add = parser.add_argument
    add("command", choices=COMMANDS)
    add("--name", default="mnist", help="of all that is made; default: %(default)s")
    add("--region", help="default: where this name is already, else that of `aws configure`")
    add("--type", default="g4dn.xlarge", help="up: of the instance; default: %(default)s")
    add("--zone", help="up: an availability zone; default: EC2's choice")
    add("--spot", action="store_true", help="up: cheaper, and may be taken away")
    add("--shutdown", metavar="N", help="train: end the instance N minutes after the training")
    add("--to", type=Path, default=Path("ec2"), metavar="DIR", help="fetch: where; default: %(default)s")
    add("--all-regions", action="store_true", help="down: look everywhere")
    args, args.flags = parser.parse_known_args(arguments)
    if args.flags and args.command not in ("train", "ssh"):
        parser.error(f"unrecognized arguments: {' '.join(args.flags)}")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,62}", args.name):
        parser.error("--name may have letters, digits, - and _")
    return args


def lock(place):
    """Makes the folder where there is none; returns an open file that keeps a second `up` out."""
    place.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    file = place.lock.open("w")
    with contextlib.suppress(ImportError):  # Windows has none
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return file


def main(arguments=None):
    args = parse_args(arguments)
    try:
        place = Place(args.name, args.region)
        if place.notes.get("region", place.region) != place.region:
            raise Problem(f"{args.name!r} is in {place.notes['region']}: `down` first, or another --name")
        place.instances()  # before anything is written: does AWS answer at all?
        with lock(place) if args.command == "up" else contextlib.nullcontext():
            if args.command == "up":
                place.note(region=place.region)
            COMMANDS[args.command](place, args)
    except (BotoCoreError, ClientError) as error:
        sys.exit(f"ec2: error: {sentence(error)}")
    except BlockingIOError:
        sys.exit("ec2: error: another `up` of this name is under way")
    except (Problem, OSError, ValueError) as error:
        sys.exit(f"ec2: error: {error}")
    except KeyboardInterrupt:
        sys.exit("ec2: interrupted: `up` goes on, `down` ends whatever there is")


if __name__ == "__main__":
    main()
