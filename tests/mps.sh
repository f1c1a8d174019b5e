# SPDX-License-Identifier: Apache-2.0
# shellcheck shell=bash
#
# mps_start FOLDER, mps_stop: CUDA's multi-process service for the processes of this shell, so that an engine and
# dynsplitd share the GPU's time kernel by kernel instead of in slices. MPS=0, or a host without it: nothing
# happens. Changes no setting of the device; the daemon lives in FOLDER and ends with mps_stop.
mps_running=0
mps_start() {
  [[ ${MPS:-1} == 1 ]] && command -v nvidia-cuda-mps-control >/dev/null || return 0
  export CUDA_MPS_PIPE_DIRECTORY=$1/mps CUDA_MPS_LOG_DIRECTORY=$1/mps_log
  mkdir -p "$CUDA_MPS_PIPE_DIRECTORY" "$CUDA_MPS_LOG_DIRECTORY"
  if timeout 20 nvidia-cuda-mps-control -d >/dev/null 2>&1 &&
    timeout 60 "${PYTHON:-python3}" -c 'import torch; torch.zeros(1, device="cuda")' >/dev/null 2>&1; then
    mps_running=1
    return 0
  fi
  mps_stop force
}
mps_stop() {
  ((mps_running)) || [[ ${1:-} == force ]] || return 0
  echo quit | timeout 20 nvidia-cuda-mps-control >/dev/null 2>&1 || true
  unset CUDA_MPS_PIPE_DIRECTORY CUDA_MPS_LOG_DIRECTORY
  mps_running=0
}
