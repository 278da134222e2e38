{{- define "finetune-operator.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride -}}
{{- else if contains .Chart.Name .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" (.Release.Name | trunc 22 | trimSuffix "-") .Chart.Name -}}
{{- end -}}
{{- end -}}

{{- define "finetune-operator.selectorLabels" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "finetune-operator.labels" -}}
{{ include "finetune-operator.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{- define "finetune-operator.serviceAccountName" -}}
{{- if .Values.serviceAccount.name -}}
{{- .Values.serviceAccount.name -}}
{{- else if .Values.serviceAccount.create -}}
{{- include "finetune-operator.fullname" . -}}
{{- else -}}
default
{{- end -}}
{{- end -}}

{{/* A whole image reference. Call with (list . "operator"). A tag that is a digest is joined with @. */}}
{{- define "finetune-operator.image" -}}
{{- $root := index . 0 -}}
{{- $name := index . 1 -}}
{{- $image := index $root.Values.images $name -}}
{{- $hint := printf "images.%s.repository is empty: name the image with --set images.%s.repository=<registry>/finetune-%s; images/%s/Dockerfile builds it" $name $name $name $name -}}
{{- $repository := required $hint $image.repository -}}
{{- $tag := $image.tag | default $root.Chart.AppVersion -}}
{{- if hasPrefix "sha256:" $tag -}}
{{- printf "%s@%s" $repository $tag -}}
{{- else -}}
{{- printf "%s:%s" $repository $tag -}}
{{- end -}}
{{- end -}}

{{/*
"true" or nothing: whether a right that holds cluster-wide is given. Call with (list . <value>), which is true, false or
auto: what is served cluster-wide is read cluster-wide, and named namespaces mean these only.
*/}}
{{- define "finetune-operator.clusterWide" -}}
{{- $root := index . 0 -}}
{{- $value := index . 1 | toString -}}
{{- if or (eq $value "true") (and (eq $value "auto") (not $root.Values.watchNamespaces)) -}}
true
{{- end -}}
{{- end -}}

{{/* "true" or nothing: whether nodes are watched. */}}
{{- define "finetune-operator.watchesNodes" -}}
{{- include "finetune-operator.clusterWide" (list . .Values.nodes.watch) -}}
{{- end -}}

{{/* "true" or nothing: whether ClusterQueues and ResourceFlavors are read. */}}
{{- define "finetune-operator.readsClusterQueues" -}}
{{- if .Values.queue.enabled -}}
{{- include "finetune-operator.clusterWide" (list . .Values.queue.clusterQueues) -}}
{{- end -}}
{{- end -}}

{{/* The operator's one configuration file, as YAML. */}}
{{- define "finetune-operator.config" -}}
{{- $name := include "finetune-operator.fullname" . -}}
trainer:
  image: {{ include "finetune-operator.image" (list . "trainer") | quote }}
  pullPolicy: {{ .Values.images.trainer.pullPolicy }}
  pullSecrets: {{ .Values.images.trainer.pullSecrets | toJson }}
{{- if .Values.images.neuron.repository }}
  neuronImage: {{ include "finetune-operator.image" (list . "neuron") | quote }}
{{- end }}
watchNamespaces: {{ .Values.watchNamespaces | toJson }}
logLevel: {{ .Values.logLevel }}
leaderElection:
  enabled: true
  leaseName: {{ $name }}
  {{- toYaml .Values.leaderElection | nindent 2 }}
health:
  port: 8080
metrics:
  enabled: {{ .Values.metrics.enabled }}
nodes:
  watch: {{ include "finetune-operator.watchesNodes" . | default "false" }}
  {{- toYaml (omit .Values.nodes "watch") | nindent 2 }}
queue:
  enabled: {{ .Values.queue.enabled }}
{{- if .Values.progress.enabled }}
progress:
  url: https://{{ $name }}-progress.{{ .Release.Namespace }}.svc:443/v1/progress
  port: {{ .Values.progress.port }}
  tlsSecret: {{ $name }}-tls
{{- end }}
hang:
  {{- toYaml .Values.hang | nindent 2 }}
logs:
  {{- toYaml .Values.logs | nindent 2 }}
retry:
  {{- toYaml .Values.retry | nindent 2 }}
featureGates:
  {{- toYaml .Values.featureGates | nindent 2 }}
{{- /* As JSON: toYaml would write a model's parameters as a floating point number. */}}
instanceTypes: {{ .Values.instanceTypes | toJson }}
models: {{ .Values.models | toJson }}
currency: {{ .Values.currency }}
stagePriorityClassName: {{ .Values.stagePriorityClassName | quote }}
stages:
  {{- toYaml .Values.stages | nindent 2 }}
{{- end -}}
