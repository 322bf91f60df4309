// The host's side of a launch: the tensors' device, torch's current stream on it, a check after every launch.
#ifndef GENKERNELS_CUDA_LAUNCH_CUH  // a guard by name: the tests replace this file to run the kernels on the CPU
#define GENKERNELS_CUDA_LAUNCH_CUH

#include <cuda_runtime.h>
#include <dlfcn.h>

#include <stdexcept>
#include <string>
#include <utility>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

// Weak, so that the library links and loads beside a torch without CUDA, where no kernel is ever asked for.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                                                   void** ret_stream);

namespace genkernels {

// torch's current stream on a device. The function stands in libtorch_cuda.so, which a library built beside a CPU-only
// torch does not name among its dependencies, and which `import torch` loads without making its symbols global: ask for
// it by name then.
inline cudaStream_t current_stream(int32_t device) {
  static const auto get = [] {
    auto found = &aoti_torch_get_current_cuda_stream;
    if (found == nullptr) {
      void* torch_cuda = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
      if (torch_cuda != nullptr) {
        found = reinterpret_cast<decltype(found)>(dlsym(torch_cuda, "aoti_torch_get_current_cuda_stream"));
      }
    }
    if (found == nullptr)
      throw std::runtime_error("genkernels: this torch has no CUDA, libtorch_cuda.so is not loaded");
    return found;
  }();
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(get(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

// Makes a tensor's device the current one for its lifetime and launches on the stream that torch has current there.
class Launcher {
 public:
  Launcher(const char* name, const torch::stable::Tensor& tensor)
      : name_(name), guard_(tensor.get_device_index()), stream_(current_stream(tensor.get_device_index())) {}

  // kernel<<<blocks, block, 0, stream>>>(arguments...), blocks counted in 64 bits; it returns without waiting for the
  // kernel.
  template <typename... Parameters, typename... Arguments>
  void operator()(void (*kernel)(Parameters...), int64_t blocks, dim3 block, Arguments&&... arguments) const {
    clustered(kernel, blocks, block, 1, std::forward<Arguments>(arguments)...);
  }

  // The same with so many blocks to a cluster, of which `blocks` must be a multiple; 1 for none.
  template <typename... Parameters, typename... Arguments>
  void clustered(void (*kernel)(Parameters...), int64_t blocks, dim3 block, int cluster,
                 Arguments&&... arguments) const {
    if (blocks > 2147483647) fail("needs " + std::to_string(blocks) + " thread blocks, more than a grid's 2^31 - 1");
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned int>(blocks));
    config.blockDim = block;
    config.stream = stream_;
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = static_cast<unsigned int>(cluster);
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    config.attrs = &attribute;
    config.numAttrs = cluster > 1 ? 1 : 0;
    const cudaError_t error = cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...);
    if (error != cudaSuccess) {
      cudaGetLastError();  // clears it, so that it is reported once
      fail(std::string("its CUDA kernel could not be launched: ") + cudaGetErrorString(error));
    }
  }

  // Blocks of a cluster that this device runs at most, 1 where it has none, and its multiprocessors.
  int largest_cluster() const { return attribute(cudaDevAttrComputeCapabilityMajor) >= 9 ? 8 : 1; }
  int multiprocessors() const { return attribute(cudaDevAttrMultiProcessorCount); }

 private:
  int attribute(cudaDeviceAttr which) const {
    int device = 0, value = 0;
    if (cudaGetDevice(&device) != cudaSuccess || cudaDeviceGetAttribute(&value, which, device) != cudaSuccess) {
      cudaGetLastError();
      fail("its device could not be asked for its properties");
    }
    return value;
  }
  [[noreturn]] void fail(const std::string& what) const { throw std::runtime_error(std::string(name_) + ": " + what); }

  const char* name_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

}  // namespace genkernels

#endif  // GENKERNELS_CUDA_LAUNCH_CUH
