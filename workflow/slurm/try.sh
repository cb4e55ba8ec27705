#!/usr/bin/env bash
# Opt-in proof that the workflow runs through Slurm: starts a Slurm of one node on this machine, runs the tiny sweep
# through it, stops it, and compares the results with those of another pass, if one is named.
#     apt-get install slurm-wlm munge          (Debian, Ubuntu; as root)
#     bash workflow/slurm/try.sh [folder with the runs of a local pass]
# Keys, spool and ports are its own. A job's srun looks for the configuration in /etc/slurm only, so for the time of the
# run a link lies there; where a configuration lies there already, this machine has a Slurm, and nothing is done.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
reference=${1:-}
if [ -n "$reference" ]; then
    [ -d "$reference" ] || { echo "try.sh: found no folder $reference, expected the runs of a local pass" >&2; exit 2; }
    [ "$(realpath "$reference")" != "$(realpath -m runs)" ] || { echo "try.sh: found runs/ itself, expected a copy of it from another pass" >&2; exit 2; }
fi
export PATH="$PATH:/usr/sbin"
for tool in munged slurmctld slurmd sbatch squeue; do
    command -v "$tool" >/dev/null || { echo "try.sh: found no $tool, expected Slurm and MUNGE: apt-get install slurm-wlm munge" >&2; exit 2; }
done
[ "$(id -u)" = 0 ] || { echo "try.sh: found user $(id -un), expected root: slurmd starts jobs for others" >&2; exit 2; }

[ ! -e /etc/slurm/slurm.conf ] || { echo "try.sh: found /etc/slurm/slurm.conf, expected none: use the Slurm that is here, with make paper ARGS=\"--workflow-profile workflow/slurm\"" >&2; exit 2; }

at=$(mktemp -d)
chmod 755 "$at"
stop() {
    for daemon in slurmd slurmctld munged; do [ -s "$at/$daemon.pid" ] && kill "$(cat "$at/$daemon.pid")" 2>/dev/null || true; done
    sleep 1
    rm -rf "$at" /etc/slurm/slurm.conf
}
trap stop EXIT

head -c 1024 /dev/urandom > "$at/munge.key"
chmod 400 "$at/munge.key"
munged --force --key-file="$at/munge.key" --socket="$at/munge.socket" --pid-file="$at/munged.pid" --log-file="$at/munged.log" --seed-file="$at/munge.seed"
host=$(hostname -s)
cat > "$at/slurm.conf" <<CONF
ClusterName=try
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=16817
SlurmdPort=16818
AuthType=auth/munge
AuthInfo=socket=$at/munge.socket
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation=$at/state
SlurmdSpoolDir=$at/spool
SlurmctldPidFile=$at/slurmctld.pid
SlurmdPidFile=$at/slurmd.pid
SlurmctldLogFile=$at/slurmctld.log
SlurmdLogFile=$at/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SchedulerType=sched/backfill
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
ReturnToService=2
NodeName=$host NodeAddr=127.0.0.1 CPUs=$(nproc) RealMemory=$(free -m | awk '/Mem:/ {print int($2*.9)}') State=UNKNOWN
PartitionName=try Nodes=$host Default=YES MaxTime=INFINITE State=UP
CONF
mkdir -p "$at/state" "$at/spool"
ln -s "$at/slurm.conf" /etc/slurm/slurm.conf
slurmctld
slurmd
for _ in $(seq 30); do sinfo -h -o %T 2>/dev/null | grep -q idle && break; sleep 1; done
sinfo

make paper SIZE=tiny ARGS="--workflow-profile workflow/slurm --slurm-status-command squeue --default-resources runtime=30 mem_mb=2000 slurm_partition=try --slurm-no-account"
jobs=$(grep -c '_slurm_rpc_submit_batch_job: JobId=' "$at/slurmctld.log" || true)
echo "jobs that Slurm ran: $jobs"
[ "$jobs" -gt 0 ] || { echo "try.sh: found no job in Slurm's log, expected those of the tiny sweep: move runs/ away, finished runs are not made again" >&2; exit 1; }
if [ -n "$reference" ]; then
    "${VENV:-.venv}/bin/python" - "$reference" <<'PY'
import sys
from pathlib import Path
from mculora.experiments.results import differences
found = [d for name in ('iemocap-simulated-tiny', 'mosei-simulated-tiny') for d in differences(Path(sys.argv[1])/name, Path('runs')/name)]
print(*found or ['the same results as the other pass, apart from host and time'], sep='\n')
sys.exit(bool(found))
PY
fi
