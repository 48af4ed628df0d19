# The sidecar. docs/operating.md, "In a container", says how to run it.
#
#   docker build --tag keyturn .

FROM python:3.13-slim AS build
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY protos protos
COPY server server
COPY clients/python clients/python
# The build generates the stubs of the contract.
RUN python -m venv /opt/keyturn \
 && /opt/keyturn/bin/pip install --no-cache-dir '.[server,embedded]'

FROM python:3.13-slim
# tini: with --embedded, process 1 has to reap what PostgreSQL leaves behind.
# The user has a name, because PostgreSQL tells its callers by name.
RUN apt-get update \
 && apt-get install --yes --no-install-recommends tini \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --uid 10001 --user-group --no-create-home --home-dir /var/lib/keyturn \
            --shell /usr/sbin/nologin keyturn \
 && install --directory --owner=keyturn --group=keyturn --mode=0700 /run/keyturn /var/lib/keyturn
COPY --from=build /opt/keyturn /opt/keyturn
ENV PATH=/opt/keyturn/bin:$PATH \
    KEYTURN_LISTEN=unix:/run/keyturn/keyturn.sock \
    KEYTURN_SPOOL=/var/lib/keyturn/spool
USER keyturn
WORKDIR /var/lib/keyturn
VOLUME /var/lib/keyturn
# Asks on the socket. Where KEYTURN_LISTEN is something else, set KEYTURN_ADDRESS to it.
ENV KEYTURN_ADDRESS=unix:/run/keyturn/keyturn.sock
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s CMD ["keyturn", "health"]
ENTRYPOINT ["tini", "--", "keyturn"]
CMD ["serve"]
