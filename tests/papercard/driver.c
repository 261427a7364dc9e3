/* libcuda.so.1 of paper: the few driver functions that torch looks up by name, and a context that is always there. */
#include <dlfcn.h>
#include <stdint.h>

enum { SUCCESS = 0, DRIVER_VERSION = 13020 };
static char context[65536];

static int nothing(void) { return SUCCESS; }

int cuInit(unsigned flags) { return SUCCESS; }
int cuDriverGetVersion(int *version) { *version = DRIVER_VERSION; return SUCCESS; }
int cuDeviceGetCount(int *count) { *count = 1; return SUCCESS; }
int cuDeviceGet(int *device, int ordinal) { *device = ordinal; return SUCCESS; }
int cuDevicePrimaryCtxRetain(void **found, int device) { *found = context; return SUCCESS; }
int cuCtxGetCurrent(void **found) { *found = context; return SUCCESS; }
int cuGetErrorString(int error, const char **text) { *text = "an error of the paper card"; return SUCCESS; }

int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) {
  *flags = 0;
  *active = 1;
  return SUCCESS;
}

/* What is not above does nothing: torch asks for many names and calls few. */
int cuGetProcAddress_v2(const char *name, void **function, int version, uint64_t flags, int *status) {
  void *found = dlsym(RTLD_DEFAULT, name);
  *function = found ? found : (void *)nothing;
  if (status) *status = 0;
  return SUCCESS;
}
