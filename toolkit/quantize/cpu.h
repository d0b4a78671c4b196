/* Functions compiled for each kind of processor, the best of which is chosen when they are loaded. */

#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__)
#define EACH_CPU __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define EACH_CPU
#endif
#define INLINE static inline __attribute__((always_inline))
