# The image of training/cluster/kubernetes.yaml. Build and upload it under the name that is given there:
# `docker build -t registry.example.com/diffusers-vae:latest . && docker push registry.example.com/diffusers-vae:latest`
FROM python:3.12-slim

# torch.compile and Triton call a C++ compiler
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*

WORKDIR /diffusers_vae
COPY . .
# torch from PyPI brings CUDA
RUN pip install --no-cache-dir ".[train]"

CMD ["diffusers-vae", "--help"]
