# docker build -t headstart .
# docker run --rm -v "$PWD/photos:/photos" -v "$PWD/logs:/runs/logs" -v headstart:/cache headstart train --data.root=/photos
# For GPUs, add --gpus=all. For CPUs only, give the index URL of the smaller torch, from PyTorch's installation page:
# docker build -t headstart --build-arg TORCH_INDEX=ADDRESS .
FROM python:3.12-slim
ARG TORCH_INDEX=""
WORKDIR /app
COPY pyproject.toml setup.py MANIFEST.in README.md LICENSE ./
COPY src ./src
COPY data ./data
RUN pip install --no-cache-dir ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch torchvision \
    && pip install --no-cache-dir ".[timm]"
RUN useradd --uid 1000 --create-home user && mkdir -p /runs /cache && chown user /runs /cache
USER user
ENV HEADSTART_CACHE=/cache
WORKDIR /runs
ENTRYPOINT ["headstart"]
CMD ["--help"]
