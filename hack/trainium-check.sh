#!/usr/bin/env bash
# What the first person with a Trainium node runs: every claim of docs/hardware-truth.md that a command can check, in order,
# as a Markdown table that can be pasted below that page's own. Nothing here ran on a Trainium node of ours yet.
#
#   hack/trainium-check.sh cluster             where kubectl reaches the cluster; reads only
#   hack/trainium-check.sh pod IMAGE [CLAIM]   prints a pod of the Neuron image that has a node's devices: kubectl apply -f -
#   kubectl exec -i trainium-check -- bash -s -- node < hack/trainium-check.sh                       in it; reads only
#   kubectl exec -i trainium-check -- bash -s -- training SCRATCH < hack/trainium-check.sh           uses the devices and
#                                              writes below SCRATCH (CLAIM is mounted at /workspace)
# Options, before the section: --instance-type (ml.trn1.32xlarge), --namespace (of the pod).
# Exit code: 0 nothing differs, 1 something does, 2 wrong usage or nothing could be run. A row whose program is not there
# says so and is no difference.
set -uo pipefail
PATH=$PATH:/opt/amazon/efa/bin:/opt/aws/neuron/bin  # where the vendor's images have their tools

instance=ml.trn1.32xlarge
namespace=default
while [ $# -gt 0 ]; do
  case "$1" in
    --instance-type) instance=$2; shift 2 ;;
    --namespace) namespace=$2; shift 2 ;;
    *) break ;;
  esac
done
usage() { sed -n '5,13s/^# \{0,1\}//p' "${BASH_SOURCE[0]:-/dev/null}" >&2; exit 2; }

# Neuron devices, NeuronCores, EFA interfaces; what a pod requests of CPUs and of memory in GiB. A unit test holds these
# rows to operator/src/finetune_operator/core/accelerators/instances.py.
case "${instance#ml.}" in
  trn1.32xlarge) devices=16 cores=32 efa=8 cpu=119 memory=461 ;;
  trn1n.32xlarge) devices=16 cores=32 efa=16 cpu=119 memory=461 ;;
  trn2.48xlarge) devices=16 cores=64 efa=16 cpu=179 memory=1890 ;;
  *) echo "trainium-check: $instance is not known here: ml.trn1.32xlarge, ml.trn1n.32xlarge or ml.trn2.48xlarge" >&2; exit 2 ;;
esac

ran=0 differ=0
table() { printf '\n### %s (%s)\n\n| | row | claim | command | expected | found |\n|---|---|---|---|---|---|\n' "$1" "$instance"; }

# row ID PROGRAM CLAIM EXPECTED COMMAND. EXPECTED is `=text`, `~extended regular expression` or `>=number`.
row() {
  local id=$1 program=$2 claim=$3 expected=$4 command=$5 found verdict
  if ! command -v "$program" >/dev/null; then
    verdict=-
    found="$program is not here"
  else
    found=$(timeout "${ROW_SECONDS:-120}" bash -c "$command" 2>/dev/null </dev/null | tr '\n' ' ' | sed 's/ *$//' | cut -c1-200)
    ran=$((ran + 1))
    verdict=ok
    case "$expected" in
      '='*) [ "$found" = "${expected#=}" ] || verdict=NOT ;;
      '~'*) [[ "$found" =~ ${expected#\~} ]] || verdict=NOT ;;
      '>='*) [[ "$found" =~ ^[0-9]+$ ]] && [ "$found" -ge "${expected#>=}" ] || verdict=NOT ;;
    esac
    [ $verdict = ok ] || differ=$((differ + 1))
  fi
  printf '| %s | %s | %s | `%s` | `%s` | %s |\n' "$verdict" "$id" "$claim" "${command//|/\\|}" "${expected//|/\\|}" "${found:-nothing}"
}

check_cluster() {
  table "The cluster"
  local label="node.kubernetes.io/instance-type=$instance" node of_node
  node=$(kubectl get nodes -l "$label" -o 'jsonpath={.items[0].metadata.name}' 2>/dev/null)
  of_node="kubectl get node ${node:-NONE} -o jsonpath="
  local hyperpod='sagemaker\.amazonaws\.com' aws='aws\.amazon\.com'
  row K1 kubectl "Kubernetes is 1.30 or newer" '~^1\.(3[0-9]|[4-9][0-9])\.' \
    "kubectl version | sed -n 's/^Server Version: v//p'"
  row K2 kubectl "nodes carry their instance type with SageMaker's prefix" '>=1' "kubectl get nodes -l $label -o name | wc -l"
  row K3 kubectl "a HyperPod node is called hyperpod-i-…" '~^hyperpod-i-' "$of_node'{.metadata.name}'"
  row K4 kubectl "a node that may be used has the health label Schedulable" '=Schedulable' \
    "$of_node'{.metadata.labels.$hyperpod/node-health-status}'"
  row K5 kubectl "the deep check's label is Passed, or there is none" '~^(Passed)?$' \
    "$of_node'{.metadata.labels.$hyperpod/deep-health-check-status}'"
  row K6 kubectl "the device plugin offers all devices as aws.amazon.com/neuron" "=$devices" "$of_node'{.status.allocatable.$aws/neuron}'"
  row K7 kubectl "or by the older name, which is then the one that is requested" "~^($devices)?\$" \
    "$of_node'{.status.allocatable.$aws/neurondevice}'"
  row K8 kubectl "it counts this many logical NeuronCores" "=$cores" "$of_node'{.status.allocatable.$aws/neuroncore}'"
  row K9 kubectl "the EFA plugin offers this many interfaces" "=$efa" "$of_node'{.status.allocatable.vpc\\.amazonaws\\.com/efa}'"
  row K10 kubectl "a training pod's memory request fits, in GiB" ">=$memory" \
    "$of_node'{.status.allocatable.memory}' | sed 's/Ki\$//' | awk '{print int(\$1 / 1048576)}'"
  row K11 kubectl "its CPU request fits" ">=$cpu" "$of_node'{.status.allocatable.cpu}' | awk '/m\$/ {print int(\$1 / 1000); next} {print}'"
  row K12 kubectl "it has no taint but aws.amazon.com/neuron, which training pods tolerate" '=' \
    "$of_node'{.spec.taints[*].key}' | tr ' ' '\\n' | grep -vx aws.amazon.com/neuron"
  row K13 kubectl "fault labels and annotation have these keys, where any node has one" '~^([a-z-]*fault-(types|reasons|details) ?)*$' \
    "kubectl get nodes -o json | grep -o 'sagemaker.amazonaws.com/[a-z-]*fault[a-z-]*' | sed 's|.*/||' | sort -u"
  row K14 kubectl "Kueue serves v1beta1 or v1beta2" '~v1beta[12]' "kubectl api-versions | grep ^kueue.x-k8s.io/"
  row K15 kubectl "the ClusterQueues cover the devices by one name, the nodes' own" '~^aws\.amazon\.com/neuron(device)?$' \
    "kubectl get clusterqueues -o jsonpath='{.items[*].spec.resourceGroups[*].coveredResources}' | grep -o 'aws.amazon.com/neuron[a-z]*' | grep -v neuroncore | sort -u"
  row K16 kubectl "no ClusterQueue covers huge pages, which pods therefore do not request" '=0' \
    "kubectl get clusterqueues -o jsonpath='{.items[*].spec.resourceGroups[*].coveredResources}' | grep -c hugepages"
  row K17 kubectl "task governance calls a team's queue hyperpod-ns-TEAM-localqueue" '~^hyperpod-ns-.+-localqueue' \
    "kubectl get localqueues -A -o jsonpath='{.items[*].metadata.name}' | tr ' ' '\\n' | grep ^hyperpod-ns- | head -1"
  row K18 kubectl "priority classes are called NAME-priority" '~-priority( |$)' \
    "kubectl get workloadpriorityclasses -o jsonpath='{.items[*].metadata.name}'"
  row K19 kubectl "FSx for Lustre gives claims that many nodes share" '=fsx.csi.aws.com' \
    "kubectl get storageclasses,persistentvolumes -o json | grep -o fsx.csi.aws.com | head -1"
}

print_pod() {
  [ $# -ge 1 ] || usage
  cat <<YAML
# Started as training pods are: uid 65532, no rights, a read-only root. It holds one whole node until it is deleted.
apiVersion: v1
kind: Pod
metadata: {name: trainium-check, namespace: $namespace}
spec:
  restartPolicy: Never
  automountServiceAccountToken: false
  nodeSelector: {node.kubernetes.io/instance-type: $instance}
  tolerations: [{key: aws.amazon.com/neuron, operator: Exists, effect: NoSchedule}]
  securityContext: {runAsNonRoot: true, runAsUser: 65532, runAsGroup: 65532, fsGroup: 65532, seccompProfile: {type: RuntimeDefault}}
  containers:
    - name: check
      image: $1
      command: [sleep, "7200"]
      env: [{name: HOME, value: /tmp}]
      resources:
        requests: {cpu: "$cpu", memory: ${memory}Gi, aws.amazon.com/neuron: "$devices", vpc.amazonaws.com/efa: "$efa"}
        limits: {aws.amazon.com/neuron: "$devices", vpc.amazonaws.com/efa: "$efa"}
      securityContext: {allowPrivilegeEscalation: false, readOnlyRootFilesystem: true, capabilities: {drop: [ALL]}}
      volumeMounts: [{name: scratch, mountPath: /tmp}, {name: shm, mountPath: /dev/shm}, {name: workspace, mountPath: /workspace}]
  volumes:
    - {name: scratch, emptyDir: {}}
    - {name: shm, emptyDir: {medium: Memory, sizeLimit: $((memory / 8))Gi}}
    - {name: workspace, $(if [ $# -ge 2 ]; then echo "persistentVolumeClaim: {claimName: $2}"; else echo "emptyDir: {}"; fi)}
YAML
}

version_of() { echo "python3 -c \"from importlib.metadata import version; print(version('$1'))\""; }

check_node() {
  table "The node and the image"
  row N1 id "stages run as uid 65532" '=65532' "id -u"
  row N2 find "that uid may open every Neuron device" '=' "find /dev -maxdepth 1 -name 'neuron[0-9]*' \\( ! -readable -o ! -writable \\)"
  row N3 ls "all devices are in the container" "=$devices" "ls -d /dev/neuron[0-9]* | wc -l"
  row N4 cat "the firmware tells the instance type" "~^${instance#ml.}" "cat /sys/devices/virtual/dmi/id/product_name"
  row N5 neuron-ls "neuron-ls counts this many cores" "=$cores" \
    "neuron-ls --json-output | python3 -c 'import json, sys; print(sum(each[\"nc_count\"] for each in json.load(sys.stdin)))'"
  row N6 neuron-ls "and this much memory for each core, in GiB" "=$([ $cores = 64 ] && echo 24 || echo 16)" \
    "neuron-ls --json-output | python3 -c 'import json, sys; all = json.load(sys.stdin); print(round(sum(each[\"memory_size\"] for each in all) / sum(each[\"nc_count\"] for each in all) / 2**30))'"
  row N7 ls "every EFA interface is in the container" "=$efa" "ls -d /dev/infiniband/uverbs* | wc -l"
  row N8 fi_info "libfabric finds the EFA provider on each" ">=$efa" "fi_info -p efa -t FI_EP_RDM | grep -c '^provider: efa'"
  row N9 prlimit "memory may be locked without a limit, as EFA needs" '=unlimited' "prlimit --memlock --noheadings --raw --output SOFT"
  row N10 df "/dev/shm is what the pod asked for, not the runtime's 64 MiB (GiB)" ">=$((memory / 8 - 1))" "df -k /dev/shm | awk 'NR == 2 {print int(\$2 / 1048576)}'"
  row N11 python3 "our environment's Python is 3.10" '~^3\.10\.' "python3 -c 'import platform; print(platform.python_version())'"
  row N12 python3 "torch is the base image's 2.8.0" '~^2\.8\.0' "$(version_of torch)"
  row N13 python3 "so are torch-neuronx" '~^2\.8\.0' "$(version_of torch-neuronx)"
  row N14 neuronx-cc "neuronx-cc" '~ 2\.21\.' "neuronx-cc --version"
  row N15 python3 "libneuronxla" '~^2\.2\.' "$(version_of libneuronxla)"
  row N16 python3 "and neuronx-distributed 0.15" '~^0\.15\.' "$(version_of neuronx-distributed)"
  row N17 python3 "optimum-neuron is our own" '=0.4.5' "$(version_of optimum-neuron)"
  row N18 python3 "with the transformers that it pins" '~^4\.57\.' "$(version_of transformers)"
  row N19 neuron_parallel_compile "optimum-neuron's neuron_parallel_compile stands first on PATH" '=/opt/finetune/bin/neuron_parallel_compile' \
    "command -v neuron_parallel_compile"
  row N20 python3 "what a training imports can be imported" '=ok' \
    "python3 -c 'import optimum.neuron.models.training, optimum.neuron.peft, finetune_trainer.backends.neuron; print(\"ok\")' | tail -1"
  row N21 python3 "the vendor's code knows the chip" "~^trn[12]\$" "python3 -c 'from torch_neuronx.utils import get_platform_target; print(get_platform_target())' | tail -1"
}

check_training() {
  [ $# -eq 1 ] || usage
  local scratch=$1 cache="$1/neuron-cache"
  if ! mkdir -p "$cache"; then echo "trainium-check: $scratch cannot be written" >&2; exit 2; fi
  export NEURON_CC_FLAGS="--model-type=transformer --cache_dir=$cache" NEURON_RT_NUM_CORES=$cores MALLOC_ARENA_MAX=70 OMP_NUM_THREADS=1
  export ROW_SECONDS=1800
  cat > "$scratch/ranks.py" <<'PYTHON'
# Each rank adds 1: the sum over all ranks, by the collectives that training uses.
import torch, torch.distributed as dist, torch_xla.core.xla_model as xm, torch_xla.distributed.xla_backend
dist.init_process_group("xla")
one = torch.ones(1, device=xm.xla_device())
dist.all_reduce(one)
xm.mark_step()
total = int(one.cpu().item())
if dist.get_rank() == 0:
    print("sum", total)
PYTHON
  cat > "$scratch/graph.py" <<'PYTHON'
# One small graph; its result says whether what is random on the device follows from the seed.
import torch, torch_xla.core.xla_model as xm
device = xm.xla_device()
def draw(seed):
    xm.set_rng_state(seed)
    mask = torch.nn.functional.dropout(torch.ones(64, 64, device=device), p=0.5)
    xm.mark_step()
    return mask.cpu()
first, again, other = draw(7), draw(7), draw(8)
print("same seed equal", bool((first == again).all()), "other seed equal", bool((first == other).all()))
PYTHON
  table "Training"
  row T1 python3 "collectives work between the ranks of a node" "=sum $cores" \
    "python3 -m torch.distributed.run --standalone --nproc-per-node $cores $scratch/ranks.py | grep ^sum"
  row T2 neuron_parallel_compile "extraction and compilation end in a summary without failures" '~Total failed compilations: 0' \
    "neuron_parallel_compile python3 $scratch/graph.py 2>&1 | grep -o 'Total failed compilations: [0-9]*' | tail -1"
  row T3 ls "a compiled graph is a folder MODULE_… with model.neff below the compiler's version" '>=1' \
    "ls -d $cache/neuronxcc-*/MODULE_*/model.neff | wc -l"
  row T4 python3 "what was compiled ahead is found: running it compiles nothing" '=0' \
    "before=\$(find $cache -name model.neff | wc -l); python3 $scratch/graph.py >/dev/null; echo \$((\$(find $cache -name model.neff | wc -l) - before))"
  row T5 python3 "dropout on the device follows from the seed set before each step" '=same seed equal True other seed equal False' \
    "python3 $scratch/graph.py | grep ^same"
  row T6 nccom-test "the bandwidth of an all-reduce over the node's cores is measured" '~[0-9]' \
    "nccom-test -r $cores -b 64MB -e 64MB allr | tail -1"
}

case "${1:-}" in
  cluster) check_cluster ;;
  node) check_node ;;
  training) shift; check_training "$@" ;;
  pod) shift; print_pod "$@"; exit 0 ;;
  *) usage ;;
esac
printf '\n%s rows ran, %s differ\n' "$ran" "$differ"
[ "$ran" -gt 0 ] || exit 2
[ "$differ" -eq 0 ]
