//! System shared memory: its routes, and how inference requests reach it.

use bytes::Bytes;
use serde::Deserialize;
use serde_json::{Value, json};

use super::binary::SharedSlice;
use super::json::{Object, from_slice};
use super::reply::Reply;
use crate::domain::Failure;
use crate::transport::Api;

/// What is to be done with regions; `name` `None` means all of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Act {
    Status(Option<String>),
    Register(String),
    Unregister(Option<String>),
}

#[derive(Deserialize)]
struct RegisterJson {
    key: String,
    #[serde(default)]
    offset: usize,
    byte_size: usize,
}

pub(super) fn act(api: &Api, act: &Act, body: &[u8]) -> Result<Reply, Failure> {
    match act {
        Act::Status(name) => {
            let regions = api.shm.status(name.as_deref())?;
            let regions = regions.into_iter().map(|region| {
                json!({
                    "name": region.name,
                    "key": region.key,
                    "offset": region.offset,
                    "byte_size": region.byte_size,
                })
            });
            return Ok(Reply::value(&regions.collect::<Value>()));
        }
        Act::Register(name) => {
            let Object(RegisterJson { key, offset, byte_size }) = from_slice(body)?;
            api.shm.register(name, &key, offset, byte_size)?;
        }
        Act::Unregister(name) => api.shm.unregister(name.as_deref())?,
    }
    Ok(Reply::empty(http::StatusCode::OK))
}

/// Copies a slice out of its region.
///
/// # Errors
/// As the region says.
pub(super) fn read(api: &Api, slice: &SharedSlice) -> Result<Bytes, Failure> {
    let (offset, size) = (addressable(slice, slice.offset)?, addressable(slice, slice.byte_size)?);
    api.shm.read(&slice.region, offset, size)
}

/// Puts `data` at the start of a slice.
///
/// # Errors
/// As the region says.
pub(super) fn write(api: &Api, slice: &SharedSlice, data: &[u8]) -> Result<(), Failure> {
    api.shm.write(&slice.region, addressable(slice, slice.offset)?, data)
}

fn addressable(slice: &SharedSlice, number: u64) -> Result<usize, Failure> {
    usize::try_from(number).map_err(|_| {
        Failure::invalid(format!("{number} is beyond shared memory region '{}'", slice.region))
    })
}
