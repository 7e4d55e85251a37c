//! Runs a loop compiled for the widest vector instructions that the processor has, found at run time.

/// Calls `f` compiled for AVX-512 or AVX2 where the processor has them; the build itself may target any x86-64.
///
/// Only what is inlined into `f` is compiled anew, so closures passed here are marked `#[inline(always)]`. No multiplication is
/// contracted with an addition, so every variant gives the same bits.
#[inline(always)]
pub fn vectorised<R>(f: impl FnOnce() -> R) -> R {
    #[cfg(target_arch = "x86_64")]
    {
        if let Some(simd) = pulp::x86::V4::try_new() {
            return simd.vectorize(f);
        }
        if let Some(simd) = pulp::x86::V3::try_new() {
            return simd.vectorize(f);
        }
    }
    f()
}
