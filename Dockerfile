# Builds the image that serves, and with `--target loadtest` the image that loads it.
# ACCELERATOR=cpu takes onnxruntime, ACCELERATOR=gpu takes onnxruntime-gpu with its CUDA libraries.
# EXTRA=otel adds what REFRAIN_TRACING=otlp needs.
ARG BASE_IMAGE=python:3.11-slim

# Dependencies are read out of pyproject.toml, not by installing the project: this layer is rebuilt when they change,
# not when the code does. The environments carry no pip of their own.
FROM ${BASE_IMAGE} AS requirements
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /build
COPY pyproject.toml constraints.txt ./
RUN python -c "import tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
[open(name + '.txt', 'w').write('\n'.join(wanted)) for name, wanted in \
{'core': p['dependencies'], **p['optional-dependencies']}.items()]"
RUN python -m venv --without-pip /opt/refrain

FROM requirements AS service-dependencies
ARG ACCELERATOR=cpu
ARG EXTRA=
RUN case "${ACCELERATOR}" in cpu|gpu) ;; *) echo "ACCELERATOR is cpu or gpu, not '${ACCELERATOR}'" >&2; exit 1 ;; esac
RUN pip --python /opt/refrain/bin/python install -c constraints.txt -r core.txt -r "${ACCELERATOR}.txt" ${EXTRA:+-r "${EXTRA}.txt"} \
 && find /opt/refrain -type d -name tests -prune -exec rm -r {} +

FROM requirements AS loadtest-dependencies
RUN pip --python /opt/refrain/bin/python install -c constraints.txt -r loadtest.txt

# A checkout or an export may be readable by its owner alone; in the image others read it and nobody writes.
FROM ${BASE_IMAGE} AS service-content
WORKDIR /app
COPY service ./service
COPY models ./models
RUN chmod -R a+rX,a-w .

FROM ${BASE_IMAGE} AS loadtest-content
WORKDIR /app
COPY loadtest ./loadtest
RUN chmod -R a+rX,a-w .

# What both images share: an unprivileged user, nothing written to disk, the environment first on the path.
FROM ${BASE_IMAGE} AS runtime
RUN groupadd --gid 10001 refrain \
 && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /app --shell /usr/sbin/nologin refrain
ENV PATH=/opt/refrain/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
WORKDIR /app
STOPSIGNAL SIGTERM

FROM runtime AS loadtest
COPY --from=loadtest-dependencies /opt/refrain /opt/refrain
COPY --from=loadtest-content /app /app
USER 10001:10001
# matplotlib keeps a cache of fonts.
ENV MPLCONFIGDIR=/tmp/matplotlib
CMD ["python", "-m", "loadtest", "--host", "http://service:8000", "--output-dir", "/tmp/loadtest"]

FROM runtime AS service
COPY --from=service-dependencies /opt/refrain /opt/refrain
COPY --from=service-content /app /app
USER 10001:10001
# ONNX Runtime's Linux wheels report usage to their maker unless told not to.
ENV REFRAIN_HOST=0.0.0.0 ORT_DISABLE_TELEMETRY=1
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as u; u.build_opener(u.ProxyHandler({})).open('http://127.0.0.1:' + os.environ.get('REFRAIN_PORT', '8000') + '/healthz', timeout=2)"]
CMD ["python", "-m", "service"]
