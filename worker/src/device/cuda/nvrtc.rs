//! NVRTC: CUDA C++ to machine code, in this process. It needs no GPU and no driver.

use std::{
    ffi::{CString, c_char, c_int},
    ptr,
    sync::OnceLock,
};

use cudarc::nvrtc::sys::nvrtcProgram;

use super::libs::{Library, LibraryError, Wanted, functions, string};

const NVRTC: Wanted = Wanted {
    what: "NVIDIA's run-time compiler",
    soname: "libnvrtc.so.13",
    companions: &["libnvrtc-builtins.so.13.0"],
    advice: "install CUDA 13.0's NVRTC (the Python wheel nvidia-cuda-nvrtc brings it), or fill the cache of kernels \
             with `swallow-worker kernels`",
};

functions! {
    /// What is used of NVRTC.
    Nvrtc {
        version = c"nvrtcVersion" (*mut c_int, *mut c_int) -> c_int;
        error_string = c"nvrtcGetErrorString" (c_int) -> *const c_char;
        create = c"nvrtcCreateProgram" (*mut nvrtcProgram, *const c_char, *const c_char, c_int, *const *const c_char,
            *const *const c_char) -> c_int;
        destroy = c"nvrtcDestroyProgram" (*mut nvrtcProgram) -> c_int;
        compile = c"nvrtcCompileProgram" (nvrtcProgram, c_int, *const *const c_char) -> c_int;
        log_size = c"nvrtcGetProgramLogSize" (nvrtcProgram, *mut usize) -> c_int;
        log = c"nvrtcGetProgramLog" (nvrtcProgram, *mut c_char) -> c_int;
        cubin_size = c"nvrtcGetCUBINSize" (nvrtcProgram, *mut usize) -> c_int;
        cubin = c"nvrtcGetCUBIN" (nvrtcProgram, *mut c_char) -> c_int;
    }
}

/// A compiled file.
pub(super) struct Compiled {
    /// Machine code.
    pub(super) cubin: Vec<u8>,
    /// What the compiler said; with `-Xptxas=-v`, also each kernel's registers and spills.
    pub(super) log: String,
}

impl Nvrtc {
    /// The compiler of this machine, opened once.
    ///
    /// # Errors
    /// It is missing or not of CUDA 13.
    pub(super) fn get() -> Result<&'static Self, LibraryError> {
        static NVRTC_ONCE: OnceLock<Result<Nvrtc, LibraryError>> = OnceLock::new();
        NVRTC_ONCE
            .get_or_init(|| Self::look_up(Library::open(NVRTC)?))
            .as_ref()
            .map_err(Clone::clone)
    }

    /// Its version, such as "13.0".
    pub(super) fn version_text(&self) -> String {
        let (mut major, mut minor) = (0, 0);
        // SAFETY: writes two numbers.
        unsafe { (self.version)(&mut major, &mut minor) };
        format!("{major}.{minor}")
    }

    /// Compiles one file.
    ///
    /// # Errors
    /// The compiler's messages.
    pub(super) fn compile(&self, name: &str, source: &str, flags: &[String]) -> Result<Compiled, String> {
        let text = |text: &str| CString::new(text).map_err(|_| format!("{name} holds a zero byte"));
        let (source, file) = (text(source)?, text(name)?);
        let flags: Vec<CString> = flags.iter().map(|flag| text(flag)).collect::<Result<_, _>>()?;
        let flags: Vec<*const c_char> = flags.iter().map(|flag| flag.as_ptr()).collect();
        let n_flags = c_int::try_from(flags.len()).expect("a handful");
        let mut program = ptr::null_mut();
        // SAFETY: the texts end in zero bytes and live; there are no headers.
        let code = unsafe {
            (self.create)(
                &mut program,
                source.as_ptr(),
                file.as_ptr(),
                0,
                ptr::null(),
                ptr::null(),
            )
        };
        self.check(code, name)?;
        // SAFETY: the program lives until it is destroyed below; the flags live.
        let compiled = unsafe {
            let code = (self.compile)(program, n_flags, flags.as_ptr());
            self.outcome(program, name, code)
        };
        // SAFETY: created above, destroyed once.
        unsafe { (self.destroy)(&mut program) };
        compiled
    }

    /// # Safety
    /// `program` lives and was compiled.
    unsafe fn outcome(&self, program: nvrtcProgram, name: &str, code: c_int) -> Result<Compiled, String> {
        let mut size = 0;
        // SAFETY: the caller's promise; the buffers have the sizes that the compiler gives.
        unsafe {
            let mut log = Vec::new();
            if (self.log_size)(program, &mut size) == 0 {
                log.resize(size, 0);
                (self.log)(program, log.as_mut_ptr().cast());
            }
            let log = String::from_utf8_lossy(&log)
                .trim_end_matches('\0')
                .trim()
                .to_owned();
            if code != 0 {
                return Err(format!("{name}: {}\n{log}", string((self.error_string)(code))));
            }
            self.check((self.cubin_size)(program, &mut size), name)?;
            let mut cubin = vec![0; size];
            self.check((self.cubin)(program, cubin.as_mut_ptr().cast()), name)?;
            Ok(Compiled { cubin, log })
        }
    }

    fn check(&self, code: c_int, name: &str) -> Result<(), String> {
        if code == 0 {
            return Ok(());
        }
        // SAFETY: gives a constant text for any code.
        let text = string(unsafe { (self.error_string)(code) });
        Err(format!("{name}: {text}"))
    }
}
