//! NCCL's library, as far as it is used here, loaded when it is asked for.
//!
//! The calls are those of `nccl.h` (NVIDIA, NCCL 2.x, whose binary interface is stable). Results are read as numbers, because a
//! newer library may return one that is not known here.

use std::ffi::{CStr, c_char, c_int, c_void};

use cudarc::driver::sys::CUstream;
use libloading::Library;

use crate::error::CollectiveError;

/// Bytes of an id.
pub const ID_BYTES: usize = 128;
/// Where the library may be found: what the runtime packages and the wheels install, and the link of the developers' package.
const NAMES: [&str; 2] = ["libnccl.so.2", "libnccl.so"];
/// The oldest version that is taken: 2.10, of 2021.
const OLDEST: c_int = 21_000;

/// What ranks meet by.
#[repr(C)]
#[derive(Clone, Copy)]
struct UniqueId([u8; ID_BYTES]);

/// A communicator, which belongs to NCCL.
pub(crate) type Comm = *mut c_void;

const SUCCESS: c_int = 0;
const IN_PROGRESS: c_int = 7;
/// `ncclSum`.
const SUM: c_int = 0;

/// Types of elements.
#[derive(Clone, Copy, Debug)]
#[repr(i32)]
pub(crate) enum Element {
    U8 = 1,
    F32 = 7,
}

/// `ncclConfig_t` as of 2.17, of which later versions take the rest to be what it is by default.
#[repr(C)]
struct Config {
    size: usize,
    magic: u32,
    version: u32,
    blocking: c_int,
    cluster: c_int,
    min_cubes: c_int,
    max_cubes: c_int,
    net_name: *const c_char,
}

impl Config {
    /// The first version that has it.
    const SINCE: c_int = 21_700;
    const MAGIC: u32 = 0xcafe_beef;
    const UNSAID: c_int = c_int::MIN;

    fn at_most(cubes: c_int) -> Self {
        Self {
            size: size_of::<Self>(),
            magic: Self::MAGIC,
            version: Self::SINCE as u32,
            blocking: Self::UNSAID,
            cluster: Self::UNSAID,
            min_cubes: Self::UNSAID,
            max_cubes: cubes,
            net_name: std::ptr::null(),
        }
    }
}

type InitConfig = unsafe extern "C" fn(*mut Comm, c_int, UniqueId, c_int, *mut Config) -> c_int;
type Init = unsafe extern "C" fn(*mut Comm, c_int, UniqueId, c_int) -> c_int;
type AllReduce = unsafe extern "C" fn(*const c_void, *mut c_void, usize, c_int, c_int, Comm, CUstream) -> c_int;
type AllGather = unsafe extern "C" fn(*const c_void, *mut c_void, usize, c_int, Comm, CUstream) -> c_int;

/// The functions.
#[derive(Clone, Copy)]
struct Functions {
    version: unsafe extern "C" fn(*mut c_int) -> c_int,
    unique_id: unsafe extern "C" fn(*mut UniqueId) -> c_int,
    init: Init,
    /// From 2.14 on.
    init_config: Option<InitConfig>,
    abort: unsafe extern "C" fn(Comm) -> c_int,
    asynchronous: unsafe extern "C" fn(Comm, *mut c_int) -> c_int,
    all_reduce: AllReduce,
    all_gather: AllGather,
    group_start: unsafe extern "C" fn() -> c_int,
    group_end: unsafe extern "C" fn() -> c_int,
    error: unsafe extern "C" fn(c_int) -> *const c_char,
    /// From 2.13 on.
    last_error: Option<unsafe extern "C" fn(Comm) -> *const c_char>,
}

/// NCCL, loaded. Cheap to clone.
#[derive(Clone)]
pub struct Nccl {
    functions: Functions,
    version: c_int,
}

impl std::fmt::Debug for Nccl {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Nccl").field(&self.version()).finish()
    }
}

impl Nccl {
    /// Loads the library.
    ///
    /// # Errors
    /// [`CollectiveError::NoLibrary`] says what was tried and what to install.
    pub fn load() -> Result<Self, CollectiveError> {
        Self::load_first_of(&NAMES)
    }

    fn load_first_of(names: &[&str]) -> Result<Self, CollectiveError> {
        let mut tried = Vec::new();
        for name in names {
            // SAFETY: the initialisers of NCCL's library have no conditions.
            match unsafe { Library::new(*name) } {
                Ok(library) => return Self::of(library),
                Err(error) => {
                    let cause = std::error::Error::source(&error).map(ToString::to_string);
                    tried.push(cause.unwrap_or_else(|| format!("{name}: {error}")));
                }
            }
        }
        Err(CollectiveError::NoLibrary { problem: tried.join("; ") })
    }

    fn of(library: Library) -> Result<Self, CollectiveError> {
        /// A function by its name.
        ///
        /// # Safety
        /// The function of that name has the type `F`.
        unsafe fn find<F: Copy>(library: &Library, name: &str) -> Result<F, CollectiveError> {
            // SAFETY: promised by the caller.
            let found = unsafe { library.get::<F>(name.as_bytes()) };
            found.map(|f| *f).map_err(|_| CollectiveError::NoLibrary { problem: format!("it has no {name}") })
        }
        // SAFETY: the types are those of nccl.h.
        let functions = unsafe {
            Functions {
                version: find(&library, "ncclGetVersion")?,
                unique_id: find(&library, "ncclGetUniqueId")?,
                init: find(&library, "ncclCommInitRank")?,
                init_config: find(&library, "ncclCommInitRankConfig").ok(),
                abort: find(&library, "ncclCommAbort")?,
                asynchronous: find(&library, "ncclCommGetAsyncError")?,
                all_reduce: find(&library, "ncclAllReduce")?,
                all_gather: find(&library, "ncclAllGather")?,
                group_start: find(&library, "ncclGroupStart")?,
                group_end: find(&library, "ncclGroupEnd")?,
                error: find(&library, "ncclGetErrorString")?,
                last_error: find(&library, "ncclGetLastError").ok(),
            }
        };
        // Never unloaded: NCCL has threads that outlive its communicators.
        std::mem::forget(library);
        let mut nccl = Self { functions, version: 0 };
        let mut version = 0;
        // SAFETY: the call writes the version into `version`.
        nccl.check("ncclGetVersion", unsafe { (functions.version)(&mut version) })?;
        nccl.version = version;
        if version < OLDEST {
            let problem = format!("this is version {}, and 2.10 is needed", nccl.version());
            return Err(CollectiveError::NoLibrary { problem });
        }
        Ok(nccl)
    }

    /// Major, minor and patch, such as `2.27.3`. Ranks need the same one.
    pub fn version(&self) -> String {
        let Self { version, .. } = self;
        format!("{}.{}.{}", version / 10_000, version / 100 % 100, version % 100)
    }

    /// What one rank makes and all [join](crate::Endpoint::join) by: [`ID_BYTES`] bytes.
    ///
    /// # Errors
    /// The host has no network interface for it.
    pub fn unique_id(&self) -> Result<Vec<u8>, CollectiveError> {
        let mut id = UniqueId([0; ID_BYTES]);
        // SAFETY: the call writes an id.
        self.check("ncclGetUniqueId", unsafe { (self.functions.unique_id)(&mut id) })?;
        Ok(id.0.to_vec())
    }

    fn check(&self, call: &'static str, code: c_int) -> Result<(), CollectiveError> {
        if code == SUCCESS {
            return Ok(());
        }
        let text = |text: *const c_char| match text.is_null() {
            true => String::new(),
            // SAFETY: NCCL returns a text that stays, and ends with a zero, for every code.
            false => unsafe { CStr::from_ptr(text) }.to_string_lossy().trim().to_string(),
        };
        // SAFETY: any code is allowed.
        let mut problem = text(unsafe { (self.functions.error)(code) });
        if let Some(last) = self.functions.last_error {
            // SAFETY: the communicator is not looked at.
            let last = text(unsafe { last(std::ptr::null_mut()) });
            if !last.is_empty() {
                problem += &format!(": {last}");
            }
        }
        problem += " (NCCL_DEBUG=INFO has it say more)";
        Err(CollectiveError::Nccl { call, problem })
    }

    /// Whether a communicator can be made whose kernels have a limited number of cubes: from 2.17 on.
    pub(crate) fn limits_cubes(&self) -> bool {
        self.version >= Config::SINCE && self.functions.init_config.is_some()
    }

    /// A communicator; returns when all ranks are there, or fails. Its kernels have at most `cubes` cubes, where that is said and this
    /// version [knows it](Self::limits_cubes).
    ///
    /// # Safety
    /// The context of the rank's device is current.
    pub(crate) unsafe fn init(
        &self,
        ranks: usize,
        id: &[u8],
        rank: usize,
        cubes: Option<u32>,
    ) -> Result<Comm, CollectiveError> {
        let wrong = |problem: String| CollectiveError::Nccl { call: "ncclCommInitRank", problem };
        let bytes = id.try_into().map_err(|_| wrong(format!("an id has {ID_BYTES} bytes, this has {}", id.len())))?;
        let [ranks, rank] = [ranks, rank].map(c_int::try_from);
        let (Ok(ranks), Ok(rank)) = (ranks, rank) else { return Err(wrong("too many ranks".into())) };
        let mut comm: Comm = std::ptr::null_mut();
        let limit = cubes.and_then(|cubes| c_int::try_from(cubes).ok()).filter(|_| self.limits_cubes());
        let code = match (limit, self.functions.init_config) {
            (Some(limit), Some(init)) => {
                let mut config = Config::at_most(limit);
                // SAFETY: the context is current; the call writes a communicator, and reads the configuration.
                unsafe { init(&mut comm, ranks, UniqueId(bytes), rank, &mut config) }
            }
            // SAFETY: as above.
            _ => unsafe { (self.functions.init)(&mut comm, ranks, UniqueId(bytes), rank) },
        };
        self.check("ncclCommInitRank", code)?;
        Ok(comm)
    }

    /// Ends what a communicator has under way, and the communicator.
    ///
    /// # Safety
    /// The communicator is one, and is not used again.
    pub(crate) unsafe fn abort(&self, comm: Comm) -> Result<(), CollectiveError> {
        // SAFETY: promised by the caller.
        self.check("ncclCommAbort", unsafe { (self.functions.abort)(comm) })
    }

    /// What a communicator has met with by itself since.
    ///
    /// # Safety
    /// The communicator is one.
    pub(crate) unsafe fn state(&self, comm: Comm) -> Result<(), CollectiveError> {
        let mut code = SUCCESS;
        // SAFETY: promised by the caller; the call writes a code.
        self.check("ncclCommGetAsyncError", unsafe { (self.functions.asynchronous)(comm, &mut code) })?;
        self.check("an operation", if code == IN_PROGRESS { SUCCESS } else { code })
    }

    /// Queues the operations that `queue` asks for as one.
    pub(crate) fn grouped(&self, queue: impl FnOnce() -> Result<(), CollectiveError>) -> Result<(), CollectiveError> {
        // SAFETY: a group begins and ends on this thread.
        self.check("ncclGroupStart", unsafe { (self.functions.group_start)() })?;
        let queued = queue();
        // SAFETY: as above. It ends also when an operation was refused.
        let ended = self.check("ncclGroupEnd", unsafe { (self.functions.group_end)() });
        queued.and(ended)
    }

    /// Queues a sum over all ranks in place.
    ///
    /// # Safety
    /// `at` is the address of `count` elements on the communicator's device, which nothing else uses until the operation is done.
    pub(crate) unsafe fn sum(
        &self,
        at: u64,
        count: usize,
        element: Element,
        comm: Comm,
        stream: CUstream,
    ) -> Result<(), CollectiveError> {
        let at = at as *mut c_void;
        // SAFETY: promised by the caller; the same address for both means in place.
        let code = unsafe { (self.functions.all_reduce)(at, at, count, element as c_int, SUM, comm, stream) };
        self.check("ncclAllReduce", code)
    }

    /// Queues a gather of every rank's `count` elements, in the order of ranks.
    ///
    /// # Safety
    /// `from` is the address of `count` elements, `to` that of as many times the number of ranks, which nothing else uses
    /// until the operation is done.
    pub(crate) unsafe fn gather(
        &self,
        from: u64,
        to: u64,
        count: usize,
        element: Element,
        comm: Comm,
        stream: CUstream,
    ) -> Result<(), CollectiveError> {
        // SAFETY: promised by the caller.
        let code = unsafe {
            (self.functions.all_gather)(from as *const c_void, to as *mut c_void, count, element as c_int, comm, stream)
        };
        self.check("ncclAllGather", code)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn what_is_missing_is_named_with_its_cure() {
        let message = Nccl::load_first_of(&["libnccl-of-nowhere.so.2"]).unwrap_err().to_string();
        for words in ["libnccl-of-nowhere.so.2", "libnccl2", "nvidia-nccl-cu13", "LD_LIBRARY_PATH"] {
            assert!(message.contains(words), "{words}: {message}");
        }
        // A library that is another one.
        let message = Nccl::load_first_of(&["libc.so.6"]).unwrap_err().to_string();
        assert!(message.contains("ncclGetVersion"), "{message}");
    }
}
