//! A safe layer over libsafepatch, for one patch of bf16 entries: lengths are checked, the engine is closed when it is
//! dropped, and no call can outlive its buffers.

use std::ffi::{CStr, CString};
use std::fmt;
use std::ptr;

use safepatch_sys as sys;

/// What the library says about a call that failed.
#[derive(Debug)]
pub struct Error {
    pub status: i32,
    pub text: String,
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl std::error::Error for Error {}

fn check(status: sys::sp_status) -> Result<(), Error> {
    if status == sys::SP_OK {
        return Ok(());
    }
    // SAFETY: the text is the thread's own, and copied before its next call.
    let text = unsafe { CStr::from_ptr(sys::sp_last_error()) };
    Err(Error { status, text: text.to_string_lossy().into_owned() })
}

/// What a patch's settings come down to.
pub struct Patch<'a> {
    pub name: &'a str,
    pub seed: u64,
    pub top: f64,
    pub retain: f64,
    pub scale: f32,
}

/// How many entries were selected, and how many of them have other bits than before.
#[derive(Debug, PartialEq, Eq)]
pub struct Merged {
    pub selected: i64,
    pub changed: i64,
}

/// The C++ engine. Its calls may be made from several threads; they take turns.
pub struct Engine(*mut sys::sp_engine);

// SAFETY: the library guards its engines.
unsafe impl Send for Engine {}
unsafe impl Sync for Engine {}

impl Drop for Engine {
    fn drop(&mut self) {
        // SAFETY: it was opened, is closed once, and no call can be running on it.
        unsafe { sys::sp_engine_close(self.0) }
    }
}

impl Engine {
    pub fn open(threads: i32) -> Result<Engine, Error> {
        let mut engine = ptr::null_mut();
        // SAFETY: the pointer is valid for the call.
        check(unsafe { sys::sp_engine_open(threads, ptr::null(), &mut engine) })?;
        Ok(Engine(engine))
    }

    /// Merge the patched bf16 entries of a whole tensor into its base, in place.
    pub fn merge(&self, tensor: &str, base: &mut [u16], patched: &[u16], patch: &Patch) -> Result<Merged, Error> {
        assert_eq!(base.len(), patched.len(), "entries of the base and the patch");
        let name = |text: &str| CString::new(text).expect("names without NUL");
        let entries = base.len() as i64;
        let (mut random_key, mut keep, mut quota) = (0, 0, 0);
        // SAFETY: the names and the outputs live through the calls.
        unsafe {
            check(sys::sp_random_key(patch.seed, name(patch.name).as_ptr(), name(tensor).as_ptr(), &mut random_key))?;
            check(sys::sp_keep(patch.retain, &mut keep))?;
            check(sys::sp_quota(patch.top, entries, &mut quota))?;
        }
        let none = sys::sp_bits { data: ptr::null(), dtype: sys::SP_BF16 };
        let given = sys::sp_patch {
            size: size_of::<sys::sp_patch>(),
            present: 1,
            kind: sys::SP_CHECKPOINT,
            importance: sys::SP_MAGNITUDE,
            weight: 0,
            values: sys::sp_bits { data: patched.as_ptr().cast(), ..none },
            scores: none,
            lora: sys::sp_lora { a: ptr::null(), b: ptr::null(), rank: 0, rows: 0, cols: 0, scale: 0.0 },
            random_key,
            keep,
            scale: patch.scale,
            reserved: 0,
            skip: 0,
        };
        let out = base.as_mut_ptr();
        let block = sys::sp_block {
            size: size_of::<sys::sp_block>(),
            base: sys::sp_bits { data: out.cast(), ..none },
            entries,
            start: 0,
            patches: &given,
            patch_count: 1,
            acts: sys::SP_ALONE,
            join: sys::SP_SUM,
            order: 0,
            progress: None,
            user: ptr::null_mut(),
            lambda: ptr::null(),
        };
        let mut cut = sys::sp_cut { size: size_of::<sys::sp_cut>(), ..Default::default() };
        let mut found = sys::sp_patch_report { size: size_of::<sys::sp_patch_report>(), ..Default::default() };
        let mut report = sys::sp_report {
            size: size_of::<sys::sp_report>(),
            patches: &mut found,
            overflow: Default::default(),
            acted: 0,
            changed: 0,
        };
        // SAFETY: all buffers have `entries` entries and live through the call; the output may be the base itself.
        check(unsafe { sys::sp_merge(self.0, &block, &quota, out.cast(), &mut cut, &mut report) })?;
        Ok(Merged { selected: found.selected, changed: report.changed })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::mem::offset_of;

    #[test]
    fn layouts_are_those_of_the_abi() {
        assert_eq!(unsafe { sys::sp_abi_version() }, sys::SP_ABI_VERSION);
        assert_eq!(size_of::<sys::sp_bits>(), 16);
        assert_eq!(size_of::<sys::sp_lora>(), 48);
        assert_eq!((size_of::<sys::sp_patch>(), offset_of!(sys::sp_patch, random_key)), (136, 104));
        assert_eq!((size_of::<sys::sp_block>(), offset_of!(sys::sp_block, progress)), (96, 72));
        assert_eq!((size_of::<sys::sp_cut>(), offset_of!(sys::sp_cut, before)), (40, 16));
        assert_eq!((size_of::<sys::sp_patch_report>(), offset_of!(sys::sp_patch_report, negative)), (80, 64));
        assert_eq!((size_of::<sys::sp_report>(), offset_of!(sys::sp_report, changed)), (48, 40));
    }

    #[test]
    fn a_bad_argument_is_an_error() {
        let engine = Engine::open(1).unwrap();
        let patch = Patch { name: "patch", seed: 0, top: 2.0, retain: 1.0, scale: 1.0 };
        let error = engine.merge("t", &mut [0, 1], &[1, 0], &patch).unwrap_err();
        assert_eq!(error.text, "top: expected 0 to 1");
    }
}
