//! A packet that says: what went into the hop before this has come out.
//!
//! A hop keeps packets in their order: an interface has one queue, a session one key, and the two hosts
//! have one address each on it. So one more packet, sent when nothing else is let in any more, comes out
//! last. It goes to the other end's tunnel address, where the guard drops it like all that belongs to no
//! connection; it is seen before, by a packet socket (packet(7)) on the hop's interface.
//!
//! It may be lost like any packet, so it is sent again and again: the first to arrive will do.

use std::io;
use std::mem::size_of;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::time::Duration;

use nix::libc;
use nix::sys::socket::{AddressFamily, LinkAddr, SockFlag, SockType, SockaddrLike as _};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::time::{Instant, interval, timeout};

use super::address::Ends;
use super::error::{Error, Result};
use super::{Connection, DISCARD, HopId, Tunnels, interface};

/// How often it is sent.
const AGAIN: Duration = Duration::from_millis(5);
/// The length of a header of UDP, in bytes (RFC 768).
const UDP_HEADER: usize = 8;
/// What fits of a packet in which it is.
const LARGEST: usize = 256;

/// Waits for the mark that comes out of a hop.
#[derive(Debug)]
pub(crate) struct Awaited {
    socket: AsyncFd<OwnedFd>,
    /// Where the packet's content begins.
    content: usize,
    mark: Vec<u8>,
}

impl Tunnels {
    /// Begins to look for a mark that the other end of a hop [sends](Self::send_mark).
    ///
    /// # Errors
    /// [`Error::Unknown`], [`Error::TooEarly`], and [`Error::Marker`] if the kernel refuses.
    pub(crate) fn await_mark(&self, hop: HopId, mark: &str) -> Result<Awaited> {
        let (record, connection) = self.connected(hop)?;
        let ends = ends(&connection);
        let refused = |source| Error::Marker {
            interface: record.spec.interface.clone(),
            source,
        };
        let index = interface::index_of(&record.spec.interface)
            .ok_or_else(|| refused(io::ErrorKind::NotFound.into()))?;
        let v4 = ends.is_none_or(|ends| ends.local.is_ipv4());
        Ok(Awaited {
            socket: listen(index, v4).map_err(refused)?,
            content: header(v4) + UDP_HEADER,
            mark: mark.into(),
        })
    }

    /// Sends a mark after all that has gone into a hop, again and again for a while.
    ///
    /// # Errors
    /// [`Error::Unknown`], [`Error::TooEarly`], and [`Error::Marker`] if the first cannot be sent.
    pub(crate) async fn send_mark(&self, hop: HopId, mark: &str, long: Duration) -> Result<()> {
        let (record, connection) = self.connected(hop)?;
        let Some(Ends { local, peer, .. }) = ends(&connection) else {
            return Ok(());
        };
        let refused = |source| Error::Marker {
            interface: record.spec.interface.clone(),
            source,
        };
        let socket = tokio::net::UdpSocket::bind((local, 0))
            .await
            .map_err(refused)?;
        socket.connect((peer, DISCARD)).await.map_err(refused)?;
        let mark = mark.to_owned();
        socket.send(mark.as_bytes()).await.map_err(refused)?;
        tokio::spawn(async move {
            let (began, mut again) = (Instant::now(), interval(AGAIN));
            while began.elapsed() < long {
                again.tick().await;
                // One that is not sent is one that is lost.
                let _ = socket.send(mark.as_bytes()).await;
            }
        });
        Ok(())
    }
}

impl Awaited {
    /// Waits until it is there; `false` if that takes longer than this, or if the interface has gone.
    pub(crate) async fn came(&self, within: Duration) -> bool {
        matches!(timeout(within, self.arrival()).await, Ok(Ok(())))
    }

    async fn arrival(&self) -> io::Result<()> {
        let mut packet = [0; LARGEST];
        loop {
            let length = self
                .socket
                .async_io(Interest::READABLE, |socket| {
                    Ok(rustix::io::read(socket, &mut packet)?)
                })
                .await?;
            let content = packet[..length].get(self.content..).unwrap_or_default();
            if content.starts_with(&self.mark) {
                return Ok(());
            }
        }
    }
}

/// The tunnel's own addresses, of the family that both ends have.
fn ends(connection: &Connection) -> Option<Ends> {
    connection.v4.or(connection.v6)
}

/// The length of a header of IP without options, in bytes (RFC 791 and RFC 8200).
fn header(v4: bool) -> usize {
    if v4 { 20 } else { 40 }
}

/// A socket that gets the packets of one interface for the discard service, from the header of IP on.
fn listen(index: u32, v4: bool) -> io::Result<AsyncFd<OwnedFd>> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    // Without a protocol it gets nothing until it is bound.
    let socket = nix::sys::socket::socket(AddressFamily::Packet, SockType::Datagram, flags, None)?;
    only_for_discard(&socket, v4)?;
    let protocol = if v4 { libc::ETH_P_IP } else { libc::ETH_P_IPV6 };
    let address = libc::sockaddr_ll {
        sll_family: libc::AF_PACKET as u16,
        // Both fit into 16 bits: 0x0800 and 0x86dd.
        sll_protocol: (protocol as u16).to_be(),
        sll_ifindex: i32::try_from(index).map_err(io::Error::other)?,
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 0,
        sll_addr: [0; 8],
    };
    let length = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
    // SAFETY: it is a whole `sockaddr_ll`, of that family and that length, and lives through the call.
    let address = unsafe { LinkAddr::from_raw((&raw const address).cast(), Some(length)) };
    let address = address.ok_or(io::ErrorKind::InvalidInput)?;
    nix::sys::socket::bind(socket.as_raw_fd(), &address)?;
    // SAFETY: the value owns its descriptor, and nothing here closes or replaces it.
    Ok(unsafe { AsyncFd::register_with_interest(socket, Interest::READABLE) }?)
}

/// Has the kernel drop all other packets before they are copied (`Documentation/networking/filter.rst`).
fn only_for_discard(socket: &OwnedFd, v4: bool) -> io::Result<()> {
    const BYTE: u16 = (libc::BPF_LD | libc::BPF_B | libc::BPF_ABS) as u16;
    const HALF: u16 = (libc::BPF_LD | libc::BPF_H | libc::BPF_ABS) as u16;
    const EQUAL: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
    const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;
    const UDP: u32 = libc::IPPROTO_UDP as u32;
    // Where the protocol is, and the port of the destination.
    let (protocol, port) = if v4 { (9, 22) } else { (6, 42) };
    let step = |code, jt, jf, k| libc::sock_filter { code, jt, jf, k };
    let mut program = [
        step(BYTE, 0, 0, protocol),
        step(EQUAL, 0, 3, UDP),
        step(HALF, 0, 0, port),
        step(EQUAL, 0, 1, DISCARD.into()),
        step(RETURN, 0, 0, LARGEST as u32),
        step(RETURN, 0, 0, 0),
    ];
    let program = libc::sock_fprog {
        len: program.len() as u16,
        filter: program.as_mut_ptr(),
    };
    // SAFETY: the option takes a `sock_fprog`, whose program has that length; both live through the call.
    let set = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ATTACH_FILTER,
            (&raw const program).cast(),
            size_of::<libc::sock_fprog>() as libc::socklen_t,
        )
    };
    nix::errno::Errno::result(set)?;
    Ok(())
}
