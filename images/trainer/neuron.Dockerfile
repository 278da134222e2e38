# The stages compile and train on Trainium, over a vendor's Neuron image. Build context: the repository's root, with our
# wheel in build/wheels/neuron (hack/images.py makes it). `make images-neuron` builds it, or prints the command.
#
# Nothing of the base is replaced: what we add lies in a virtual environment of its own, to which the base's packages are
# lent (vendor_packages.py), and the build fails where one of ours would be seen in place of one that the vendor built or
# where a version of ours does not fit what the vendor's packages ask for. The base's own environment stays as it was.
#
#   BASE_IMAGE  a Neuron training image with Python 3.10 or 3.11 as python3 and its venv module. Pinned by SDK and instance
#               family in trainer/src/finetune_trainer/neuron_stack.py; `hack/images.py base` prints it
#   IMPORTS     check: the build imports the vendor's and our modules for trn1 as a training does, without a device. skip:
#               for a builder of another architecture
# Build secrets, all optional and never kept in a layer: as in Dockerfile.
ARG BASE_IMAGE

FROM ${BASE_IMAGE} AS tools
USER 0
RUN --mount=type=secret,id=ca \
    --mount=type=secret,id=PIP_INDEX_URL,env=PIP_INDEX_URL \
    --mount=type=bind,source=requirements/bootstrap.txt,target=/tmp/bootstrap.txt \
    set -eu; \
    if [ -s /run/secrets/ca ]; then export PIP_CERT=/run/secrets/ca; fi; \
    python3 -m venv /opt/uv; \
    /opt/uv/bin/pip install --no-cache-dir --disable-pip-version-check --require-hashes --only-binary :all: -r /tmp/bootstrap.txt

FROM ${BASE_IMAGE}
ARG IMPORTS=check
LABEL org.opencontainers.image.title="finetune-neuron" \
      org.opencontainers.image.licenses="Apache-2.0"
USER 0

# Layer 1: optimum-neuron and its pins. --no-deps because what they need besides the base has, which the check holds it to.
# The uid gets a name because the compiler names its work folder by it.
RUN --mount=type=secret,id=ca \
    --mount=type=secret,id=PIP_INDEX_URL,env=PIP_INDEX_URL \
    --mount=type=secret,id=UV_DEFAULT_INDEX,env=UV_DEFAULT_INDEX \
    --mount=type=bind,from=tools,source=/opt/uv,target=/opt/uv \
    --mount=type=bind,source=requirements/neuron.txt,target=/tmp/requirements.txt \
    --mount=type=bind,source=images/trainer/vendor_packages.py,target=/tmp/vendor_packages.py \
    set -eu; \
    if [ -s /run/secrets/ca ]; then export SSL_CERT_FILE=/run/secrets/ca; fi; \
    if [ -n "${PIP_INDEX_URL:-}" ]; then export UV_DEFAULT_INDEX="${UV_DEFAULT_INDEX:-$PIP_INDEX_URL}"; fi; \
    getent passwd 65532 > /dev/null || echo 'finetune:x:65532:65532::/tmp:/usr/sbin/nologin' >> /etc/passwd; \
    python3 -m venv --without-pip /opt/finetune; \
    python3 /tmp/vendor_packages.py lend /opt/finetune; \
    /opt/uv/bin/uv pip install --python /opt/finetune/bin/python --no-cache --no-deps --no-build --require-hashes --compile-bytecode \
        -r /tmp/requirements.txt; \
    /opt/finetune/bin/python /tmp/vendor_packages.py close; \
    /opt/finetune/bin/python /tmp/vendor_packages.py check

# Layer 2: our own wheel, and a look at what a training will import.
RUN --mount=type=bind,from=tools,source=/opt/uv,target=/opt/uv \
    --mount=type=bind,source=build/wheels/neuron,target=/tmp/wheels \
    set -eu; \
    /opt/uv/bin/uv pip install --python /opt/finetune/bin/python --no-cache --no-index --no-deps \
        /tmp/wheels/finetune_trainer-*.whl; \
    /opt/finetune/bin/python -m compileall -q /opt/finetune/lib/python3*/site-packages/finetune_trainer; \
    case "$IMPORTS" in \
        check) NEURON_PLATFORM_TARGET_OVERRIDE=trn1 /opt/finetune/bin/python -c \
            'import optimum.neuron.models.training, optimum.neuron.peft, finetune_trainer.backends.neuron';; \
        skip) ;; \
        *) echo "IMPORTS is '$IMPORTS', expected check or skip" >&2; exit 1;; \
    esac

# The base's PATH stays behind ours: the compiler and the runtime's tools are there.
ENV PATH=/opt/finetune/bin:$PATH \
    HOME=/tmp \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HF_HUB_DISABLE_TELEMETRY=1
USER 65532:65532
WORKDIR /tmp
ENTRYPOINT ["finetune-trainer"]
