//! The inside of a userspace device: how packets get into gotatun and out of it.
//!
//! WireGuard itself is gotatun's. Its own ways in and out take one packet per system call, and a
//! packet's way through the kernel costs several times what its encryption does. These take many:
//!
//! ```text
//!   tun ── segment ──> gotatun ──> underlay      read: up to 64 KiB of a stream at once;
//!                                                sent: up to 64 datagrams of one size at once
//!   tun <── merge ──── gotatun <── underlay      received: the same;
//!                                                written: packets that follow each other at once
//! ```
//!
//! Nothing here reorders packets, and nothing drops them while there is a queue before it that
//! holds them: gotatun's channels make the reader wait, so the queues of the interface and of the
//! socket are what fills first.

#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzing;
mod merge;
mod offload;
mod path;
mod segment;
#[cfg(test)]
mod tests;
mod tun;
mod underlay;

use std::sync::Arc;

use gotatun::device::uapi::UapiServer;
use gotatun::device::{Device, DeviceBuilder, DeviceTransports, Error};

use path::PathMtu;
use underlay::Underlay;

/// The largest packet that the device takes, in bytes: gotatun has buffers of 4,096 bytes, in
/// which 16 for the authentication tag and up to 16 of header have to fit as well.
pub const MAX_MTU: u16 = 4064;

/// Makes an interface and the device behind it, which is configured through `uapi`.
pub(super) async fn build(
    interface: &str,
    uapi: UapiServer,
) -> Result<Device<impl DeviceTransports>, Error> {
    let path = Arc::new(PathMtu::new());
    let (writer, reader) = tun::open(interface, Arc::clone(&path))?;
    DeviceBuilder::new()
        .with_udp(Underlay::new(path))
        .with_uapi(uapi)
        .with_ip_pair(writer, reader)
        .build()
        .await
}
