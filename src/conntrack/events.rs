//! What happens to connections, as it happens.

use std::collections::VecDeque;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use futures::Stream;
use neli::consts::nl::NlmF;
use neli::consts::socket::{Msg, NlFamily};
use neli::socket::NlSocket;
use rustix::io::Errno;
use rustix::net::sockopt;
use tokio::io::unix::AsyncFd;

use super::wire::{
    CT_DELETE, CT_NEW, GROUP_CONNTRACK_DESTROY, GROUP_CONNTRACK_NEW, GROUP_CONNTRACK_UPDATE,
};
use super::{Entry, Result};
use crate::netlink::{Error, Message, Messages, Namespace, channel};

/// How much may wait to be read before the kernel starts to leave events out.
const RECEIVE_BUFFER: usize = 4 << 20;

/// What happened to a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Change {
    /// It began.
    New,
    /// Its state, mark or status changed.
    Update,
    /// It ended, or was forgotten.
    Destroy,
}

/// Something that happened.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Event {
    /// To a connection.
    Connection {
        /// What happened.
        change: Change,
        /// To which; in a destroy event without state and time-out.
        entry: Box<Entry>,
    },
    /// More happened than could be read in time, and is lost: look at the table instead.
    Lost,
}

/// The stream of events of one namespace.
///
/// A kernel with `net.netfilter.nf_conntrack_events=2` (the default since 5.19) prepares a
/// connection for events only if somebody listens *when it begins*: of older ones, nothing is ever
/// heard, not even their end. Who waits for the end of a connection has to look at the table from
/// time to time as well.
pub struct Events {
    socket: AsyncFd<NlSocket>,
    buffer: Vec<u8>,
    waiting: VecDeque<Event>,
}

impl std::fmt::Debug for Events {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Events")
            .field("waiting", &self.waiting.len())
            .finish_non_exhaustive()
    }
}

impl Events {
    /// Hears of these changes only: whoever wants few does not have the kernel send all.
    pub(super) fn open(namespace: &Namespace, changes: &[Change]) -> Result<Events> {
        const DOING: &str = "listen to connections' events";
        let fail = |source| Error::Socket {
            doing: DOING,
            source,
        };
        let groups: Vec<u32> = changes
            .iter()
            .map(|change| match change {
                Change::New => GROUP_CONNTRACK_NEW,
                Change::Update => GROUP_CONNTRACK_UPDATE,
                Change::Destroy => GROUP_CONNTRACK_DESTROY,
            })
            .collect();
        let socket = namespace.run(|| channel::open(NlFamily::Netfilter, &groups))??;
        let descriptor = channel::borrow(&socket);
        // Beyond net.core.rmem_max only root gets what it asks for.
        if sockopt::set_socket_recv_buffer_size_force(descriptor, RECEIVE_BUFFER).is_err() {
            let _ = sockopt::set_socket_recv_buffer_size(descriptor, RECEIVE_BUFFER);
        }
        Ok(Events {
            socket: channel::register(socket).map_err(fail)?,
            buffer: vec![0; 64 * 1024],
            waiting: VecDeque::new(),
        })
    }
}

pub(super) fn read(message: &Message<'_>) -> Option<Event> {
    let change = match message.kind {
        // NLM_F_CREATE, NLM_F_EXCL: it is new (`ctnetlink_conntrack_event`).
        CT_NEW if message.flags & NlmF::CREATE.bits() != 0 => Change::New,
        CT_NEW => Change::Update,
        CT_DELETE => Change::Destroy,
        _ => return None,
    };
    Some(Event::Connection {
        change,
        entry: Box::new(Entry::decode(message)?),
    })
}

impl Stream for Events {
    type Item = Result<Event>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = self.get_mut();
        loop {
            if let Some(event) = this.waiting.pop_front() {
                return Poll::Ready(Some(Ok(event)));
            }
            let mut guard = match ready!(this.socket.poll_read_ready(cx)) {
                Ok(guard) => guard,
                Err(source) => return Poll::Ready(Some(Err(failed(source)))),
            };
            match guard.try_io(|socket| socket.get_ref().recv(&mut this.buffer[..], Msg::empty())) {
                Err(_would_block) => {}
                Ok(Ok((length, _))) => {
                    let received = &this.buffer[..length.min(this.buffer.len())];
                    this.waiting
                        .extend(Messages::new(received).filter_map(|m| read(&m)));
                }
                Ok(Err(e)) if Errno::from_io_error(&e) == Some(Errno::NOBUFS) => {
                    return Poll::Ready(Some(Ok(Event::Lost)));
                }
                Ok(Err(e)) if e.kind() == io::ErrorKind::Interrupted => {}
                Ok(Err(source)) => return Poll::Ready(Some(Err(failed(source)))),
            }
        }
    }
}

fn failed(source: io::Error) -> super::Error {
    Error::Socket {
        doing: "listen to connections' events",
        source,
    }
    .into()
}
