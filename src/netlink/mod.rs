//! The kernel's netlink families, as far as livemig speaks them itself.
//!
//! neli provides the socket and the message header; what stands in a message is laid out here with
//! three verbs: [`Body::leaf`] and [`Body::nest`] write attributes, [`Attributes`] reads them
//! without copying. A [`Channel`] then *asks* (one request, its answers, its acknowledgement),
//! asks for many things at once, or *dumps*.
//!
//! Two decisions deserve their reason:
//! - neli's router is not used. It hands every answer through bounded queues, which deadlock when
//!   a dump of more than 1,024 messages is left unread while another request is sent, and it
//!   cannot carry packets of a queue, which answer no request.
//! - A channel blocks. The kernel answers these families while `send(2)` runs, so there is nothing
//!   to wait for; and an exchange that cannot be cancelled half-way cannot leave stale answers
//!   behind. Async callers run it on tokio's blocking threads.
//!
//! A netlink socket belongs to the network namespace it was opened in, for ever. [`Namespace`]
//! opens it in the right one: a container's, say, from the host.

mod backlog;
pub(crate) mod channel;
mod closing;
mod error;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzing;
mod message;
mod namespace;
pub mod sockets;

pub use backlog::Backlog;
pub use channel::{Channel, Request};
pub use error::{Error, Result};
pub use message::{Attribute, Attributes, Body, Message, Messages};
pub use namespace::Namespace;
