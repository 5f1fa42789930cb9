//! The UDP socket of a device: as many datagrams as possible in one call.
//!
//! Most of what a small packet costs is its way through the kernel, not its encryption. With
//! `UDP_SEGMENT` (udp(7)) up to 64 datagrams of the same size go that way as one and are cut apart
//! where they leave; with `UDP_GRO`, which gotatun's socket asks for, they come in as one as well.

use std::io::{self, IoSlice};
use std::net::SocketAddr;
use std::os::fd::AsRawFd as _;
use std::sync::Arc;

use gotatun::packet::{Packet, PacketBufPool};
use gotatun::udp::socket::{UdpSocket, UdpSocketFactory};
use gotatun::udp::{UdpRecv, UdpSend, UdpTransportFactory, UdpTransportFactoryParams};
use nix::sys::socket::{ControlMessage, MsgFlags, SockaddrStorage, sendmsg};
use rustix::io::Errno;
use rustix::net::sockopt::{self, Ipv4PathMtuDiscovery};
use tokio::io::Interest;

use super::path::PathMtu;

/// The most datagrams in one call: `UDP_MAX_SEGMENTS` of include/linux/udp.h was 64 at first.
const SEGMENTS: usize = 64;
/// The most bytes in one call: what an IPv4 packet may have, without its headers.
const BYTES: usize = 65_507;

/// How much the kernel keeps for us, in bytes, in each direction. The default, 212,992, holds some
/// 250 small packets (each counts with some 800 bytes of bookkeeping), which arrive in a
/// millisecond; this is enough for tens of thousands, should this process wait for its turn.
const BUFFER: usize = 32 << 20;

/// Makes the sockets.
#[derive(Debug)]
pub(super) struct Underlay {
    path: Arc<PathMtu>,
}

impl Underlay {
    /// `path` is told where the datagrams go.
    pub(super) fn new(path: Arc<PathMtu>) -> Self {
        Self { path }
    }
}

impl UdpTransportFactory for Underlay {
    type Send = Socket;
    type Recv = Socket;

    async fn bind(&mut self, at: &UdpTransportFactoryParams) -> io::Result<(Socket, Socket)> {
        let (inner, _) = UdpSocketFactory::default().bind(at).await?;
        // Never the don't-fragment bit: Linux would set it on whatever fits the first link, and a
        // narrower one behind it would drop that, silently where ICMP is filtered. Kernel WireGuard
        // leaves it off as well. (IPv6 has no such bit: there, the sender fragments for the path
        // it knows.)
        sockopt::set_ip_mtu_discover(&inner, Ipv4PathMtuDiscovery::DONT)?;
        for set in [
            sockopt::set_socket_recv_buffer_size_force(&inner, BUFFER),
            sockopt::set_socket_send_buffer_size_force(&inner, BUFFER),
        ] {
            if let Err(error) = set {
                tracing::debug!(%error, "a UDP buffer keeps its default size");
            }
        }
        let socket = Socket {
            inner,
            path: Arc::clone(&self.path),
        };
        Ok((socket.clone(), socket))
    }
}

/// A socket as gotatun makes it, which sends datagrams of the same size together.
#[derive(Clone)]
pub(super) struct Socket {
    inner: UdpSocket,
    path: Arc<PathMtu>,
}

impl Socket {
    /// Sends datagrams of the size of the first one, of which the last may be smaller, as one.
    async fn send_together(
        &self,
        datagrams: &[(Packet, SocketAddr)],
        size: usize,
        to: SocketAddr,
    ) -> io::Result<()> {
        let size = u16::try_from(size).map_err(|_| Errno::MSGSIZE)?;
        let mut slices = [IoSlice::new(&[]); SEGMENTS];
        for (slice, (packet, _)) in slices.iter_mut().zip(datagrams) {
            *slice = IoSlice::new(packet);
        }
        let slices = &slices[..datagrams.len()];
        let socket = self.inner.socket();
        let address = SockaddrStorage::from(to);
        let control = [ControlMessage::UdpGsoSegments(&size)];
        socket
            .async_io(Interest::WRITABLE, || {
                let (fd, flags) = (socket.as_raw_fd(), MsgFlags::MSG_DONTWAIT);
                Ok(sendmsg(fd, slices, &control, flags, Some(&address))?)
            })
            .await?;
        Ok(())
    }
}

/// How many datagrams, from the first one on, can be sent together: all of its size and to the same
/// place, but for the last one, which may be smaller.
fn together(datagrams: &[(Packet, SocketAddr)], largest: usize) -> usize {
    let Some((first, to)) = datagrams.first() else {
        return 0;
    };
    let size = first.len();
    if size == 0 || size > largest {
        return 1;
    }
    let most = SEGMENTS.min(BYTES / size);
    let same = datagrams
        .iter()
        .take(most)
        .take_while(|(packet, other)| packet.len() == size && other == to)
        .count();
    let smaller = datagrams.get(same).filter(|(packet, other)| {
        same < most && other == to && !packet.is_empty() && packet.len() < size
    });
    same + usize::from(smaller.is_some())
}

impl UdpSend for Socket {
    type SendManyBuf = SendBuffer;

    async fn send_to(&self, packet: Packet, destination: SocketAddr) -> io::Result<()> {
        self.path.note(destination);
        self.inner.send_to(packet, destination).await
    }

    fn max_number_of_packets_to_send(&self) -> usize {
        self.inner.max_number_of_packets_to_send()
    }

    async fn send_many_to(
        &self,
        buffer: &mut SendBuffer,
        packets: &mut Vec<(Packet, SocketAddr)>,
    ) -> io::Result<()> {
        // What an earlier call left behind when it failed is lost.
        buffer.single.clear();
        if let Some((_, to)) = packets.last() {
            self.path.note(*to);
        }
        while let Some((first, to)) = packets.first() {
            let (size, to) = (first.len(), *to);
            let largest = self.path.largest_datagram();
            let count = together(packets, largest);
            if count > 1 {
                match self.send_together(&packets[..count], size, to).await {
                    Ok(()) => drop(packets.drain(..count)),
                    // A way out that cannot do it, or is narrower than it was. From now on this
                    // size goes one by one.
                    Err(error) if is_refused(&error) => self.path.refused(size),
                    Err(error) => return Err(error),
                }
            } else {
                let count = (1..packets.len())
                    .find(|at| together(&packets[*at..], largest) > 1)
                    .unwrap_or(packets.len());
                buffer.single.extend(packets.drain(..count));
                self.inner
                    .send_many_to(&mut buffer.inner, &mut buffer.single)
                    .await?;
            }
        }
        Ok(())
    }

    fn local_addr(&self) -> io::Result<Option<SocketAddr>> {
        self.inner.local_addr().map(Some)
    }

    fn set_fwmark(&self, mark: u32) -> io::Result<()> {
        self.inner.set_fwmark(mark)
    }
}

/// What `udp_send_skb` in the kernel's net/ipv4/udp.c answers if this size or this way out do not
/// allow segmentation.
fn is_refused(error: &io::Error) -> bool {
    [Errno::INVAL, Errno::IO, Errno::MSGSIZE, Errno::OPNOTSUPP]
        .iter()
        .any(|errno| error.raw_os_error() == Some(errno.raw_os_error()))
}

/// What sending needs, kept between two calls.
#[derive(Default)]
pub(super) struct SendBuffer {
    single: Vec<(Packet, SocketAddr)>,
    inner: <UdpSocket as UdpSend>::SendManyBuf,
}

impl UdpRecv for Socket {
    type RecvManyBuf = <UdpSocket as UdpRecv>::RecvManyBuf;

    fn recv_from(
        &mut self,
        pool: &mut PacketBufPool,
    ) -> impl Future<Output = io::Result<(Packet, SocketAddr)>> + Send {
        self.inner.recv_from(pool)
    }

    fn recv_many_from(
        &mut self,
        buffer: &mut Self::RecvManyBuf,
        pool: &mut PacketBufPool,
        packets: &mut Vec<(Packet, SocketAddr)>,
    ) -> impl Future<Output = io::Result<()>> + Send {
        self.inner.recv_many_from(buffer, pool, packets)
    }

    fn enable_udp_gro(&self) -> io::Result<()> {
        self.inner.enable_udp_gro()
    }
}
