//! Closing sockets that take the kernel long to close.
//!
//! When a netfilter socket is closed, the kernel waits until all rules have gone that anybody removed just
//! before, which takes a grace period of RCU, some 10 ms (`nft_rcv_nl_event` in
//! `net/netfilter/nf_tables_api.c`). A container should not stand still for that.

use std::ops::Deref;
use std::sync::OnceLock;
use std::sync::mpsc::{Sender, channel};

use neli::socket::NlSocket;

/// A socket that is closed on a thread of its own when it is dropped.
pub(super) struct ClosedElsewhere(Option<NlSocket>);

impl From<NlSocket> for ClosedElsewhere {
    fn from(socket: NlSocket) -> ClosedElsewhere {
        ClosedElsewhere(Some(socket))
    }
}

impl Deref for ClosedElsewhere {
    type Target = NlSocket;

    fn deref(&self) -> &NlSocket {
        match &self.0 {
            Some(socket) => socket,
            None => unreachable!("it is there until it is dropped"),
        }
    }
}

impl Drop for ClosedElsewhere {
    fn drop(&mut self) {
        static CLOSER: OnceLock<Option<Sender<NlSocket>>> = OnceLock::new();
        let closer = CLOSER.get_or_init(|| {
            let (closer, to_close) = channel();
            let close = move || to_close.into_iter().for_each(drop);
            let thread = std::thread::Builder::new().name("livemig-closing".to_owned());
            thread.spawn(close).ok().map(|_| closer)
        });
        // Without such a thread it is closed here.
        if let (Some(socket), Some(closer)) = (self.0.take(), closer) {
            let _ = closer.send(socket);
        }
    }
}
