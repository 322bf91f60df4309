// What glibc has only from 2.32 on: whether a process has one thread, by which the C++ library spares atomic
// operations. Here it always has several. Hidden, so that nobody else sees it; this file must include nothing that
// declares it.
extern "C" {
__attribute__((visibility("hidden"))) char __libc_single_threaded = 0;
}
