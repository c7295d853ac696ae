// Marks functions that CUDA compiles for both sides.

#ifndef JAX_ROUTER_HOST_DEVICE_H_
#define JAX_ROUTER_HOST_DEVICE_H_

#ifdef __CUDACC__
#define JAX_ROUTER_HOST_DEVICE __host__ __device__
#else
#define JAX_ROUTER_HOST_DEVICE
#endif

#endif  // JAX_ROUTER_HOST_DEVICE_H_
