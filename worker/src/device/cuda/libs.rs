//! NVIDIA's libraries, opened while the program runs, so that one binary serves machines with and without GPUs.
//!
//! A library is looked for by its soname first, which is what the system's linker and `LD_LIBRARY_PATH` know, then in
//! the folders where CUDA is installed, then in Python environments, whose wheels bring the same files. Every function
//! is looked up at once when a library is opened: what is missing is one line at start, never a surprise in a step.
//! That, and that it does not know NCCL's soname, is why cudarc gives the types here but not the loading.

use std::{
    ffi::{CStr, CString, c_char, c_void},
    fmt::Display,
    fs,
    path::{Path, PathBuf},
    ptr::NonNull,
};

/// A library that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LibraryError {
    /// It is nowhere.
    #[error("{what} ({soname}) is missing: {advice}")]
    Missing {
        /// In words.
        what: &'static str,
        /// The file's name.
        soname: &'static str,
        /// What to do.
        advice: &'static str,
    },
    /// It is there and does not open.
    #[error("{soname} cannot be opened: {why}")]
    Broken {
        /// The file's name.
        soname: &'static str,
        /// The linker's word.
        why: String,
    },
    /// It has not got a function that every version in use has.
    #[error("{soname} has no function {symbol}: it is too old or not the real one; {advice}")]
    Symbol {
        /// The file's name.
        soname: &'static str,
        /// The function.
        symbol: &'static str,
        /// What to do.
        advice: &'static str,
    },
    /// It is older than what the program was written for.
    #[error("{what} is version {found}, older than {needed}: {advice}")]
    Old {
        /// In words.
        what: &'static str,
        /// Its version.
        found: String,
        /// The version that serves.
        needed: &'static str,
        /// What to do.
        advice: &'static str,
    },
    /// It opened, and its first call failed.
    #[error("{what} does not start: {why}")]
    Start {
        /// In words.
        what: &'static str,
        /// Its word.
        why: String,
    },
}

/// What is looked for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wanted {
    /// In words.
    pub(super) what: &'static str,
    /// The file's name.
    pub(super) soname: &'static str,
    /// Files of the same folder that it opens by itself, by name alone.
    pub(super) companions: &'static [&'static str],
    /// What to do where it is missing or too old.
    pub(super) advice: &'static str,
}

/// An opened library. It stays open until the process ends: what it runs in the background outlives every handle.
#[derive(Clone, Copy, Debug)]
pub(super) struct Library {
    handle: NonNull<c_void>,
    wanted: Wanted,
}

// SAFETY: dlsym may be called on a handle from any thread, and the handle is never closed.
unsafe impl Send for Library {}
// SAFETY: as above.
unsafe impl Sync for Library {}

impl Library {
    /// Opens a library from wherever it is.
    pub(super) fn open(wanted: Wanted) -> Result<Self, LibraryError> {
        let mut why = match dlopen(wanted.soname) {
            Ok(handle) => return Ok(Self { handle, wanted }),
            Err(why) => why,
        };
        let folder = folders()
            .into_iter()
            .find(|folder| folder.join(wanted.soname).is_file());
        if let Some(folder) = folder {
            for companion in wanted.companions {
                // Where it is missing the library says so itself, with its own words.
                let _ = dlopen(folder.join(companion).display());
            }
            match dlopen(folder.join(wanted.soname).display()) {
                Ok(handle) => return Ok(Self { handle, wanted }),
                Err(error) => why = error,
            }
        } else if why.contains("No such file") {
            return Err(LibraryError::Missing {
                what: wanted.what,
                soname: wanted.soname,
                advice: wanted.advice,
            });
        }
        Err(LibraryError::Broken {
            soname: wanted.soname,
            why,
        })
    }

    /// The address of a function.
    pub(super) fn symbol(&self, name: &'static CStr) -> Result<NonNull<c_void>, LibraryError> {
        // SAFETY: the handle is open and the name ends in a zero byte.
        let address = unsafe { libc::dlsym(self.handle.as_ptr(), name.as_ptr()) };
        NonNull::new(address).ok_or(LibraryError::Symbol {
            soname: self.wanted.soname,
            symbol: name.to_str().unwrap_or("?"),
            advice: self.wanted.advice,
        })
    }

    /// That it is too old.
    pub(super) fn old(&self, found: String, needed: &'static str) -> LibraryError {
        LibraryError::Old {
            what: self.wanted.what,
            found,
            needed,
            advice: self.wanted.advice,
        }
    }

    /// That it does not start.
    pub(super) fn start(&self, why: impl Display) -> LibraryError {
        LibraryError::Start {
            what: self.wanted.what,
            why: why.to_string(),
        }
    }
}

/// Declares the functions of a library as a struct of addresses, all looked up by `open`.
macro_rules! functions {
    ($(#[$doc:meta])* $name:ident { $($field:ident = $symbol:literal ($($arg:ty),*) -> $out:ty;)* }) => {
        $(#[$doc])*
        pub(super) struct $name {
            $(pub(super) $field: unsafe extern "C" fn($($arg),*) -> $out,)*
        }

        impl $name {
            /// Looks up all functions of an opened library.
            fn look_up(
                library: $crate::device::cuda::libs::Library,
            ) -> Result<Self, $crate::device::cuda::libs::LibraryError> {
                Ok(Self {
                    $($field: {
                        let address = library.symbol($symbol)?;
                        // SAFETY: the library's header declares the function with these types.
                        unsafe {
                            std::mem::transmute::<std::ptr::NonNull<std::ffi::c_void>,
                                unsafe extern "C" fn($($arg),*) -> $out>(address)
                        }
                    },)*
                })
            }
        }
    };
}
pub(super) use functions;

fn dlopen(name: impl Display) -> Result<NonNull<c_void>, String> {
    let name = CString::new(name.to_string()).map_err(|_| "its path holds a zero byte".to_owned())?;
    // SAFETY: the name ends in a zero byte; the libraries' initialisers may run on any thread.
    let handle = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
    NonNull::new(handle).ok_or_else(|| {
        // SAFETY: dlerror gives a string of this thread that lives until the next call of the linker.
        let why = unsafe { libc::dlerror() };
        string(why)
    })
}

/// A library's own text; empty where there is none.
pub(super) fn string(text: *const c_char) -> String {
    if text.is_null() {
        return String::new();
    }
    // SAFETY: not null, and libraries give strings that end in a zero byte.
    unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
}

/// Where libraries of NVIDIA are found beside the linker's own folders.
fn folders() -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = [
        "/usr/local/nvidia/lib64",
        "/usr/local/nvidia/lib",
        "/usr/local/cuda/lib64",
    ]
    .map(PathBuf::from)
    .to_vec();
    let installed = inside(Path::new("/usr/local"), "cuda-");
    found.extend(installed.into_iter().rev().map(|folder| folder.join("lib64")));
    let mut prefixes: Vec<PathBuf> = std::env::var_os("VIRTUAL_ENV")
        .map(PathBuf::from)
        .into_iter()
        .collect();
    for folder in inside(Path::new("/opt"), "") {
        prefixes.push(folder.join(".venv"));
        prefixes.push(folder);
    }
    prefixes.extend(["/usr/local", "/usr"].map(PathBuf::from));
    for python in prefixes
        .iter()
        .flat_map(|prefix| inside(&prefix.join("lib"), "python3"))
    {
        for packages in ["site-packages", "dist-packages"] {
            let wheels = inside(&python.join(packages).join("nvidia"), "");
            found.extend(wheels.into_iter().map(|wheel| wheel.join("lib")));
        }
    }
    found
}

/// Folders of `folder` whose names begin so, in order.
fn inside(folder: &Path, begin: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut found: Vec<PathBuf> = entries
        .filter(|entry| entry.file_name().to_string_lossy().starts_with(begin))
        .map(|entry| entry.path())
        .filter(|path| path.is_dir())
        .collect();
    found.sort();
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIBC: Wanted = Wanted {
        what: "the C library",
        soname: "libc.so.6",
        companions: &[],
        advice: "install it",
    };

    #[test]
    fn a_missing_library_and_a_missing_function_are_one_line_each() {
        let missing = Library::open(Wanted {
            what: "the driver",
            soname: "libno-such-thing.so.1",
            ..LIBC
        });
        assert_eq!(
            missing.map(drop).map_err(|error| error.to_string()),
            Err("the driver (libno-such-thing.so.1) is missing: install it".to_owned())
        );
        let library = Library::open(LIBC).expect("this program needs it too");
        assert!(library.symbol(c"malloc").is_ok());
        assert_eq!(
            library
                .symbol(c"cuNoSuchThing")
                .map_err(|error| error.to_string()),
            Err(
                "libc.so.6 has no function cuNoSuchThing: it is too old or not the real one; install it"
                    .to_owned()
            )
        );
    }
}
