//! Closing sockets that take the kernel long to close.
//!
//! When a netfilter socket is closed, the kernel waits until all rules have gone that anybody removed just
//! before, which takes a grace period of RCU, some 10 ms (`nft_rcv_nl_event` in
//! `net/netfilter/nf_tables_api.c`). A container should not stand still for that.

use std::os::fd::OwnedFd;
use std::sync::OnceLock;
use std::sync::mpsc::{Sender, channel};

/// Closes a descriptor on a thread of its own.
pub(super) fn elsewhere(descriptor: OwnedFd) {
    static CLOSER: OnceLock<Option<Sender<OwnedFd>>> = OnceLock::new();
    let closer = CLOSER.get_or_init(|| {
        let (closer, to_close) = channel();
        let close = move || to_close.into_iter().for_each(drop);
        let thread = std::thread::Builder::new().name("livemig-closing".to_owned());
        thread.spawn(close).ok().map(|_| closer)
    });
    // Without such a thread it is closed here.
    if let Some(closer) = closer {
        let _ = closer.send(descriptor);
    }
}
