//! How much fits into one packet on the way to the peer.

use std::net::{SocketAddr, UdpSocket};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use rustix::net::sockopt;

/// How long an answer of the kernel is good for. Routes and their sizes change rarely.
const FRESH: Duration = Duration::from_secs(5);
/// Headers of UDP and of IPv4 or IPv6, in bytes.
const HEADERS_V4: usize = 8 + 20;
const HEADERS_V6: usize = 8 + 40;

/// The size of the largest datagram that leaves this host in one piece, as far as is known.
#[derive(Debug)]
pub(super) struct PathMtu {
    largest: AtomicUsize,
    /// The smallest size that was refused, and more than any datagram has at first.
    refused: AtomicUsize,
    asked: Mutex<Option<(SocketAddr, Instant)>>,
}

impl PathMtu {
    pub(super) fn new() -> Self {
        Self {
            largest: AtomicUsize::new(0),
            refused: AtomicUsize::new(usize::MAX),
            asked: Mutex::new(None),
        }
    }

    /// Datagrams go to this address now.
    pub(super) fn note(&self, to: SocketAddr) {
        let Ok(mut asked) = self.asked.lock() else {
            return;
        };
        let now = Instant::now();
        if asked.is_some_and(|(known, at)| known == to && now.duration_since(at) < FRESH) {
            return;
        }
        *asked = Some((to, now));
        // Without an answer nothing is sent together, which always works.
        let largest = ask(to).unwrap_or(0);
        self.largest.store(largest, Ordering::Relaxed);
    }

    /// The kernel would not take datagrams of this size together.
    pub(super) fn refused(&self, size: usize) {
        self.refused.fetch_min(size, Ordering::Relaxed);
    }

    /// The largest datagram that leaves in one piece, in bytes; 0 if that is not known.
    pub(super) fn largest_datagram(&self) -> usize {
        let refused = self.refused.load(Ordering::Relaxed);
        self.largest
            .load(Ordering::Relaxed)
            .min(refused.saturating_sub(1))
    }
}

/// What the kernel knows about the way to an address: the size of the first link at least.
fn ask(to: SocketAddr) -> std::io::Result<usize> {
    let any = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    let socket = UdpSocket::bind(any)?;
    // Only connected sockets have a path. Nothing is sent.
    socket.connect(to)?;
    let (mtu, headers) = if to.is_ipv4() {
        (sockopt::ip_mtu(&socket)?, HEADERS_V4)
    } else {
        (sockopt::ipv6_mtu(&socket)?, HEADERS_V6)
    };
    Ok(usize::try_from(mtu).map_or(0, |mtu| mtu.saturating_sub(headers)))
}
