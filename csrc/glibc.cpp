// glibc 2.32's flag by which libstdc++ leaves out atomic instructions in processes of one thread.
// Defined here, false, so that the library loads where glibc is older and has none.
#if defined(__linux__)
extern "C" {
__attribute__((visibility("hidden"))) char __libc_single_threaded = 0;
}
#endif
