//! What `safepatch.h` declares, as far as the safe layer uses it. Layouts are compared with the library's ABI in tests.
#![allow(non_camel_case_types)]

use std::ffi::{c_char, c_int, c_void};

pub type sp_status = c_int;
pub const SP_OK: sp_status = 0;
pub const SP_STOPPED: sp_status = 6;
pub const SP_ABI_VERSION: u32 = 3;
pub const SP_BF16: i32 = 2;
pub const SP_CHECKPOINT: i32 = 0;
pub const SP_MAGNITUDE: i32 = 0;
pub const SP_ALONE: i32 = 0;
pub const SP_SUM: i32 = 0;

pub enum sp_engine {}
pub type sp_progress = Option<unsafe extern "C" fn(user: *mut c_void, done: i64, total: i64) -> c_int>;

#[repr(C)]
#[derive(Clone, Copy)]
pub struct sp_bits {
    pub data: *const c_void,
    pub dtype: i32,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub struct sp_lora {
    pub a: *const f32,
    pub b: *const f32,
    pub rank: i64,
    pub rows: i64,
    pub cols: i64,
    pub scale: f32,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub struct sp_patch {
    pub size: usize,
    pub present: i32,
    pub kind: i32,
    pub importance: i32,
    pub weight: i32,
    pub values: sp_bits,
    pub scores: sp_bits,
    pub lora: sp_lora,
    pub random_key: u64,
    pub keep: u64,
    pub scale: f32,
    pub reserved: i32,
    pub skip: i64,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub struct sp_block {
    pub size: usize,
    pub base: sp_bits,
    pub entries: i64,
    pub start: i64,
    pub patches: *const sp_patch,
    pub patch_count: usize,
    pub acts: i32,
    pub join: i32,
    pub order: i32,
    pub progress: sp_progress,
    pub user: *mut c_void,
    pub lambda: *const f32,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct sp_cut {
    pub size: usize,
    pub key: u32,
    pub before: i64,
    pub skip_key: u32,
    pub skip_before: i64,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct sp_fault {
    pub count: i64,
    pub first: i64,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct sp_patch_report {
    pub size: usize,
    pub eligible: i64,
    pub selected: i64,
    pub applied: i64,
    pub bad_delta: sp_fault,
    pub bad_score: sp_fault,
    pub negative: sp_fault,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub struct sp_report {
    pub size: usize,
    pub patches: *mut sp_patch_report,
    pub overflow: sp_fault,
    pub acted: i64,
    pub changed: i64,
}

extern "C" {
    pub fn sp_abi_version() -> u32;
    pub fn sp_last_error() -> *const c_char;
    pub fn sp_engine_open(threads: i32, isa: *const c_char, engine: *mut *mut sp_engine) -> sp_status;
    pub fn sp_engine_close(engine: *mut sp_engine);
    pub fn sp_random_key(seed: u64, patch: *const c_char, tensor: *const c_char, key: *mut u64) -> sp_status;
    pub fn sp_keep(retain: f64, keep: *mut u64) -> sp_status;
    pub fn sp_quota(top: f64, entries: i64, quota: *mut i64) -> sp_status;
    pub fn sp_merge(
        engine: *mut sp_engine,
        block: *const sp_block,
        quotas: *const i64,
        out: *mut c_void,
        cuts: *mut sp_cut,
        report: *mut sp_report,
    ) -> sp_status;
}
