"""Train on an EC2 instance: one CloudFormation stack holds everything, and is the only state.

    python -m support.ec2 up                # create the stack: an instance that ends after 8 hours
    python -m support.ec2 train --resume    # upload the project, train with train.py's flags, follow the log
    python -m support.ec2 fetch             # download models and log
    python -m support.ec2 down              # delete everything

It needs boto3, ssh and ssh-keygen, not PyTorch. See README.md in this directory.
"""

import argparse
import getpass
import hashlib
import io
import ipaddress
import itertools
import re
import shlex
import subprocess
import sys
import tarfile
import time
import urllib.request
from datetime import datetime, timedelta, timezone
from pathlib import Path

try:
    import boto3
    from botocore.exceptions import BotoCoreError, ClientError, WaiterError
    from botocore.parsers import ResponseParserError
except ImportError as error:
    sys.exit(f"ec2: error: boto3 is not installed: pip install boto3 ({error})")

AWS_ERRORS = BotoCoreError, ClientError, ResponseParserError  # the last if a proxy answers
HERE = Path(__file__).resolve().parent
PROJECT = HERE.parent.parent
UPLOADED = "train.py", "evaluate.py", "datafile.py", "requirements.txt", "models", "support", "data"
FETCHED = re.compile(r"(best|last)_\w+\.pth|\w+\.png|train\.log|SHA256SUMS", re.ASCII)
ADDRESS_URL = "https://checkip.amazonaws.com"
DEFAULT_TYPE = "g4dn.xlarge"
IMAGES = {  # AWS's public parameters with the newest images
    "gpu": "/aws/service/deeplearning/ami/x86_64/base-oss-nvidia-driver-gpu-ubuntu-24.04/latest/ami-id",
    "cpu": "/aws/service/canonical/ubuntu/server/24.04/stable/current/amd64/hvm/ebs-gp3/ami-id",
}
REMEDIES = {  # by words in AWS's messages
    "AuthFailure|InvalidClientTokenId|SignatureDoesNotMatch": "check your AWS credentials",
    "ExpiredToken|RequestExpired": "log in to AWS again",
    "UnauthorizedOperation|AccessDenied|not authorized": "see the policy in support/ec2/README.md",
    "LimitExceeded|MaxSpotInstanceCount|quota": "ask for a higher vCPU quota of EC2 under Service Quotas",
    "Insufficient|capacity|not supported in your": "try another --zone or --type, or without --spot",
    "default VPC|DefaultVpc|VPCIdNotSpecified": "create one with: aws ec2 create-default-vpc",
    "KMS|kms|Client.InternalError": "check the KMS key with which EC2 encrypts disks",
}


class Problem(Exception):
    """An expected error, reported to the user as one line."""


def with_remedy(reason):
    """Returns AWS's reason for an error as one line, followed by a remedy if there is one."""
    remedies = [text for words, text in REMEDIES.items() if re.search(words, str(reason))]
    return "; ".join([" ".join(str(reason).split()), *remedies[:1]])


class Stack:
    """The CloudFormation stack `args.name` in one account and region."""

    def __init__(self, args, region=None):
        session = boto3.Session(profile_name=args.profile, region_name=region or args.region)
        services = "cloudformation", "ec2", "ssm", "sts"
        self.cloudformation, self.ec2, self.ssm, self.sts = map(session.client, services)
        self.name, self.region = args.name, self.ec2.meta.region_name

    def __str__(self):
        return f"{self.name} (account {self.sts.get_caller_identity()['Account']}, {self.region})"

    def describe(self):
        """Returns CloudFormation's description of the stack, or None if it does not exist."""
        try:
            return self.cloudformation.describe_stacks(StackName=self.name)["Stacks"][0]
        except ClientError as error:
            if "does not exist" in str(error):
                return None
            raise

    def instance(self, found):
        """Returns EC2's description of the instance of a described stack, or None if it is gone."""
        outputs = {output["OutputKey"]: output["OutputValue"] for output in (found or {}).get("Outputs", [])}
        if "Instance" not in outputs:
            return None
        filters = [{"Name": "instance-id", "Values": [outputs["Instance"]]}]
        reservations = self.ec2.describe_instances(Filters=filters)["Reservations"]
        instance = reservations[0]["Instances"][0] if reservations else None
        return instance if instance and instance["State"]["Code"] not in (32, 48) else None  # terminated

    def wait(self, operation, stack_id):
        """Waits until the stack is created, updated or deleted. Raises Problem if that fails."""
        try:
            waiter = self.cloudformation.get_waiter(f"stack_{operation}_complete")
            waiter.wait(StackName=stack_id, WaiterConfig={"Delay": 5, "MaxAttempts": 240})
        except WaiterError as error:
            events = self.cloudformation.describe_stack_events(StackName=stack_id)["StackEvents"]
            failed = [event for event in events if event.get("ResourceStatus", "").endswith("_FAILED")]
            reasons = [f"{event['LogicalResourceId']}: {event['ResourceStatusReason']}" for event in failed]
            raise Problem(f"{operation} failed: {with_remedy([error, *reasons][-1])}") from error

    def delete(self, found):
        """Deletes the stack, and confirms that it is deleted."""
        self.cloudformation.delete_stack(StackName=found["StackId"])
        self.wait("delete", found["StackId"])
        if self.describe():
            raise Problem(f"{self} still exists: `down` again")

    def running(self):
        """Returns the stack and its instance. Raises Problem if the instance is not running."""
        found = self.describe()
        instance = self.instance(found)
        if not instance or instance["State"]["Name"] != "running":
            state = instance["State"]["Name"] if instance else "gone" if found else "not created"
            raise Problem(f"the instance of {self} is {state}: `up`, then `train --resume`")
        return found, instance

    def device(self, instance_type):
        """Returns "gpu" if a type has an NVIDIA GPU, else "cpu". Raises Problem if it is not supported."""
        (found,) = self.ec2.describe_instance_types(InstanceTypes=[instance_type])["InstanceTypes"]
        makers = {gpu["Manufacturer"] for gpu in found.get("GpuInfo", {}).get("Gpus", [])}
        if "x86_64" not in found["ProcessorInfo"]["SupportedArchitectures"] or makers - {"NVIDIA"}:
            raise Problem(
                f"{instance_type} is not supported: choose an x86_64 type without a GPU or with NVIDIA's"
            )
        return "gpu" if makers else "cpu"


def parameters(found):
    return {one["ParameterKey"]: one["ParameterValue"] for one in found["Parameters"]}


def own_network(address):
    """Returns this computer's public IPv4 address, as given or as AWS sees it, as a /32 network."""
    try:
        if not address:
            with urllib.request.urlopen(ADDRESS_URL, timeout=10) as answer:
                address = answer.read(1000).decode("ascii", "replace").strip()
        if not ipaddress.IPv4Address(address).is_global:
            raise ValueError(f"{address} is not public")
    except (OSError, ValueError) as error:
        raise Problem(f"your public IPv4 address is unknown ({str(error)[:80]!r}): use --address") from error
    return f"{address}/32"


def public_key(folder):
    """Returns the public half of the key in a directory. Creates the key if there is none."""
    folder.mkdir(mode=0o700, exist_ok=True)
    if not (folder / "key").exists():
        create = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "tiny-mnist", "-f", "key"]
        subprocess.run(create, cwd=folder, check=True)
    show = ["ssh-keygen", "-y", "-f", "key"]
    return subprocess.run(show, cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


def create(stack, args, network, key):
    """Creates the stack."""
    instance_type = args.type or DEFAULT_TYPE
    image = stack.ssm.get_parameter(Name=IMAGES[stack.device(instance_type)])["Parameter"]["Value"]
    values = {"Address": network, "PublicKey": key, "InstanceType": instance_type, "Image": image}
    values |= {"Minutes": str(60 * args.hours), "Zone": args.zone, "Spot": str(args.spot).lower()}
    given = [{"ParameterKey": name, "ParameterValue": value} for name, value in values.items()]
    print(f"Creating {stack}: {instance_type}, charged until `down`, for {args.hours} h at most")
    body = (HERE / "stack.yaml").read_text("utf-8")
    created = stack.cloudformation.create_stack(StackName=args.name, TemplateBody=body, Parameters=given)
    stack.wait("create", created["StackId"])


def update(stack, values, network):
    """Lets SSH in from another address. With the template and all other parameters the instance is kept."""
    given = [{"ParameterKey": name, "UsePreviousValue": True} for name in values if name != "Address"]
    given += [{"ParameterKey": "Address", "ParameterValue": network}]
    updated = stack.cloudformation.update_stack(
        StackName=stack.name, UsePreviousTemplate=True, Parameters=given
    )
    stack.wait("update", updated["StackId"])
    print(f"SSH is open to {network} only")


def up(args):
    """Creates the stack or repairs it, waits until the instance accepts SSH, and sets its end."""
    stack, network, key = Stack(args), own_network(args.address), public_key(args.folder)
    found = stack.describe()
    if found and found["StackStatus"].endswith("_IN_PROGRESS"):
        operation = found["StackStatus"].split("_")[0].lower()
        stack.wait("create" if operation == "rollback" else operation, found["StackId"])
        found = stack.describe()
    instance = stack.instance(found)
    if not instance:
        if found:
            print(f"Replacing {stack}, which is {found['StackStatus']} and has no instance")
            stack.delete(found)
        create(stack, args, network, key)
    else:
        values = parameters(found)
        if args.type not in (None, values["InstanceType"]):
            raise Problem(f"{stack} is a {values['InstanceType']}: `down` first, or use another --name")
        if values["PublicKey"] != key:
            raise Problem(f"{stack} was created on another computer: use its key, or another --name")
        if instance["State"]["Name"] in ("stopping", "stopped"):
            raise Problem(f"{stack} is stopped: start it in the AWS console, or `down`")
        if values["Address"] != network:
            update(stack, values, network)
    command = "cloud-init status --wait; sudo shutdown -h"
    for attempt in range(60):
        try:
            instance = stack.running()[1]
            ended = ssh(args, instance, f"{command} +{60 * args.hours}", capture_output=True)
            break
        except Problem:
            if attempt == 59 or not stack.instance(stack.describe()):
                raise
            time.sleep(10)
    if ended.returncode:
        raise Problem(
            f"the end of the instance could not be set ({ended.stderr!r}): `down` when you are done"
        )
    ends = datetime.now(timezone.utc) + timedelta(hours=args.hours)
    tag = {"Key": "ends", "Value": ends.isoformat(timespec="minutes")}
    stack.ec2.create_tags(Resources=[instance["InstanceId"]], Tags=[tag])
    status(args)


def ssh(args, instance, *command, **options):
    """Runs a command on the instance. Raises Problem if the connection fails."""
    settings = (
        "BatchMode=yes IdentitiesOnly=yes UserKnownHostsFile=known_hosts LogLevel=ERROR ConnectTimeout=20 "
    )
    settings += (
        f"StrictHostKeyChecking=accept-new ServerAliveInterval=30 HostKeyAlias={instance['InstanceId']}"
    )
    flags = [part for setting in settings.split() for part in ("-o", setting)]
    command = ["ssh", "-F", "none", "-i", "key", *flags, f"ubuntu@{instance['PublicIpAddress']}", *command]
    if "input" not in options:
        options = {"stdin": subprocess.DEVNULL} | options  # ssh would read that of a script around it
    ended = subprocess.run(command, cwd=args.folder, **options)  # so that no path has to be quoted
    if ended.returncode == 255:
        raise Problem("the connection failed: `up` again if your address has changed, or look at `status`")
    return ended


def hours_left(found, instance):
    """Returns how many hours an instance will still run."""
    tags = {tag["Key"]: tag["Value"] for tag in instance.get("Tags", [])}
    ends = instance["LaunchTime"] + timedelta(minutes=int(parameters(found)["Minutes"]))
    ends = datetime.fromisoformat(tags["ends"]) if "ends" in tags else ends
    return (ends - datetime.now(timezone.utc)) / timedelta(hours=1)


def status(args, region=None):
    """Prints the stack's account, region and status, and its instance."""
    stack = Stack(args, region)
    found = stack.describe()
    line = f"{stack}: {found['StackStatus'] if found else 'does not exist'}"
    if instance := stack.instance(found):
        age = (datetime.now(timezone.utc) - instance["LaunchTime"]) / timedelta(hours=1)
        line += f", {instance['InstanceId']}, {instance['InstanceType']}, {instance['State']['Name']}, "
        line += f"{age:.1f} h old, ends in {hours_left(found, instance):.1f} h"
    print(line)


def archive(folder):
    """Returns a tar archive of the project, and of the states that were fetched to a directory."""
    paths = [path for name in UPLOADED for path in [PROJECT / name, *(PROJECT / name).rglob("*")]]
    names = {path: path.relative_to(PROJECT).as_posix() for path in paths if path.is_file()}
    names |= {path: f"fetched/{path.name}" for path in folder.glob("*.pth")}
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=1) as tar:
        for path, name in names.items():
            if "__pycache__" not in name:
                tar.add(path, name)
    return buffer.getvalue()


def train(args):
    """Trains on the instance, prints its log, and exits with the status of train.py if that is not 0."""
    stack = Stack(args)
    found, instance = stack.running()
    print(f"The instance ends in {hours_left(found, instance):.1f} h: move its end with `up --hours N`")
    script = (HERE / "train.sh").read_bytes().replace(b"\r\n", b"\n")
    upload = "mkdir -p mnist && cat > mnist/.train.sh && mv mnist/.train.sh mnist/train.sh"
    start = ["bash", "mnist/train.sh", "start", stack.device(instance["InstanceType"]), *args.flags]
    for command, content in (upload, script), (shlex.join(start), archive(args.to)):
        if ssh(args, instance, command, input=content).returncode:
            raise Problem("nothing was started (see above)")
    offset, ended = 0, b"running"
    while ended == b"running":
        time.sleep(2)
        log = ssh(args, instance, f"bash mnist/train.sh log {offset}", stdout=subprocess.PIPE).stdout
        ended, _, log = log.partition(b"\n")
        offset += len(log)
        print(log.decode("utf-8", "replace"), end="", flush=True)
    if ended != b"0":
        sys.exit(int(ended or 1))
    if args.then_down:
        fetch(args)
        down(args)


def fetch(args):
    """Downloads models, training states, plots and the log, each as of one moment, with checksums."""
    _, instance = Stack(args).running()
    packed = ssh(args, instance, "bash mnist/train.sh pack", capture_output=True)
    if packed.returncode:
        raise Problem("there is nothing to fetch yet")
    files = {}
    with tarfile.open(fileobj=io.BytesIO(packed.stdout)) as tar:
        for entry in tar:
            if not (entry.isfile() and FETCHED.fullmatch(entry.name)):
                raise Problem(f"the instance sent {entry.name!r}, which is not a file of a training")
            files[entry.name] = tar.extractfile(entry).read()
    sums = dict(line.split()[::-1] for line in files.pop("SHA256SUMS", b"").decode().splitlines())
    if sums != {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}:
        raise Problem("the files do not match their checksums: `fetch` again")
    args.to.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        path, temporary = args.to / name, args.to / f".{name}.tmp"
        temporary.write_bytes(content)
        if path.exists() and path.read_bytes() != content:
            others = (args.to / f"{path.stem}.{number}{path.suffix}" for number in itertools.count(1))
            path.rename(next(other for other in others if not other.exists()))
        temporary.replace(path)
        print(f"{path}: {len(content):,} bytes")


def down(args, region=None):
    """Deletes the stack and waits until AWS confirms it."""
    stack = Stack(args, region)
    found = stack.describe()
    if not (found or region):
        raise Problem(f"{stack} does not exist: nothing was deleted")
    if found:
        stack.delete(found)
    print(f"{stack}: {'deleted' if found else 'does not exist'}")


def log_in(args):
    """Opens a terminal on the instance, or runs a command there."""
    _, instance = Stack(args).running()
    sys.exit(ssh(args, instance, *map(shlex.quote, args.flags), stdin=None).returncode)


COMMANDS = {"up": up, "train": train, "fetch": fetch, "status": status, "down": down, "ssh": log_in}


def in_all_regions(args):
    """Runs a command in each region. Raises Problem, at the end, if it failed in some."""
    failed = []
    for region in sorted(one["RegionName"] for one in Stack(args).ec2.describe_regions()["Regions"]):
        try:
            COMMANDS[args.command](args, region)
        except (*AWS_ERRORS, Problem) as error:
            print(f"{region}: {with_remedy(error)}")
            failed.append(region)
    if failed:
        raise Problem(f"`{args.command}` failed in {', '.join(failed)}")


def parse_args(arguments):
    """Parses the command line. What follows `train` and `ssh` and is not a flag of theirs is passed on."""
    parser = argparse.ArgumentParser(prog="python -m support.ec2", allow_abbrev=False)
    commands, parsers = parser.add_subparsers(dest="command", required=True), {}
    user = re.sub("[^A-Za-z0-9-]", "-", getpass.getuser())
    for command, function in COMMANDS.items():
        parsers[command] = commands.add_parser(command, description=function.__doc__, allow_abbrev=False)
        add = parsers[command].add_argument
        add("--name", default=f"tiny-mnist-{user}", help="name of the stack (default: %(default)s)")
        add("--region", help="AWS region (default: that of the profile)")
        add("--profile", help="profile of the AWS CLI")
        if command in ("train", "fetch"):
            add("--to", type=Path, help="directory for downloaded files (default: ec2/<name>)")
        if command in ("status", "down"):
            add("--all-regions", action="store_true", help="in every region")
    add = parsers["up"].add_argument
    add("--type", help=f"instance type (default: {DEFAULT_TYPE})")
    add(
        "--hours",
        type=int,
        choices=range(1, 169),
        default=8,
        metavar="N",
        help="hours to its end (default: 8)",
    )
    add("--address", help="public IPv4 address of this computer (default: ask AWS)")
    add("--zone", default="", help="availability zone (default: chosen by AWS)")
    add("--spot", action="store_true", help="spot instance: cheaper, but may be taken away")
    help_ = "after a successful training, fetch and delete everything"
    parsers["train"].add_argument("--then-down", action="store_true", help=help_)
    own, rest = (list(part) for part in (itertools.takewhile("--".__ne__, arguments), arguments))
    args, args.flags = parser.parse_known_args(own)
    args.flags += rest[len(own) + 1 :]
    if args.flags and args.command not in ("train", "ssh"):
        parser.error(f"unrecognized arguments: {' '.join(args.flags)}")
    if args.command == "train" and any(flag.startswith("--ou") for flag in args.flags):
        parser.error("train.py's --output-dir is set by this command: `fetch` downloads to --to")
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9-]{0,127}", args.name):
        parser.error("--name must start with a letter and contain only letters, digits and -")
    args.to, args.folder = getattr(args, "to", None) or Path("ec2", args.name), Path.home() / ".tiny-mnist"
    return args


def main(arguments=None):
    args = parse_args(sys.argv[1:] if arguments is None else arguments)
    try:
        (in_all_regions if getattr(args, "all_regions", False) else COMMANDS[args.command])(args)
    except AWS_ERRORS as error:
        sys.exit(f"ec2: error: {with_remedy(error)}")
    except (Problem, OSError, subprocess.CalledProcessError, tarfile.TarError) as error:
        sys.exit(f"ec2: error: {error}")
    except KeyboardInterrupt:
        sys.exit("ec2: interrupted: a training or an operation of AWS continues; `down` deletes everything")


if __name__ == "__main__":
    main()
