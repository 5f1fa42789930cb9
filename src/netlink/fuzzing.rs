//! The door to the private readers: see [`crate::fuzzing`].

use super::sockets::{self, Kind};
use super::{Message, channel};

/// What a message says about a request, whatever that is.
pub(crate) fn verdict(message: &Message<'_>) {
    let _ = channel::verdict(message, "test");
}

/// A socket, if it is one.
pub(crate) fn socket(tcp: bool, message: &Message<'_>) {
    let kind = if tcp { Kind::Tcp } else { Kind::Udp };
    if let Some(socket) = sockets::read(kind, message) {
        assert_eq!(socket.kind, kind);
        assert_eq!(socket.local.is_ipv4(), socket.remote.is_ipv4());
        let _ = socket.has_undelivered();
    }
}
