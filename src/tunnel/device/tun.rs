//! The tun of a device: the interface whose packets this process reads and writes.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};

use gotatun::packet::{Ip, Packet, PacketBufPool};
use gotatun::tun::{IpRecv, IpSend, MtuWatcher};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::ioctl::{self, IntegerSetter, Opcode};
use tokio::io::unix::AsyncFd;
use tokio::sync::Notify;

use super::merge::Run;
use super::offload::{self, Offload};
use super::path::PathMtu;
use super::segment;

/// Of include/uapi/linux/if.h and if_tun.h.
const INTERFACE_NAME: usize = 16;
const IFF_TUN: u16 = 0x0001;
const IFF_NO_PI: u16 = 0x1000;
const IFF_VNET_HDR: u16 = 0x4000;
const TUNSETIFF: Opcode = ioctl::opcode::write::<i32>(b'T', 202);
const TUNSETOFFLOAD: Opcode = ioctl::opcode::write::<u32>(b'T', 208);
/// Checksums and TCP of both families are left to us (`TUN_F_CSUM`, `TUN_F_TSO4`, `TUN_F_TSO6`).
const OFFLOADS: usize = 0x01 | 0x02 | 0x04;
/// And UDP of both families (`TUN_F_USO4`, `TUN_F_USO6`). A kernel that knows these, from 6.2 on,
/// takes several datagrams in one from us as well.
const OFFLOADS_UDP: usize = OFFLOADS | 0x20 | 0x40;

/// How many reads there are before what was read goes on.
const READS: usize = 64;
/// What one read returns at most: IP's largest packet and the header before it.
const LARGEST_READ: usize = 65_535 + offload::LENGTH;
/// What gotatun's buffers take, in bytes.
const LARGEST_PACKET: usize = 4096;
/// What WireGuard adds to a packet: header and tag, in bytes.
const OVERHEAD: usize = 32;
/// What WireGuard fills packets up to, in bytes.
const PADDING: usize = 16;

/// `struct ifreq` as TUNSETIFF reads it.
#[repr(C)]
struct InterfaceRequest {
    name: [u8; INTERFACE_NAME],
    flags: u16,
    rest: [u8; 22],
}

/// Makes an interface, and gives its two ends.
pub(super) fn open(interface: &str, path: Arc<PathMtu>) -> io::Result<(Writer, Reader)> {
    let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let file = rustix::fs::open("/dev/net/tun", flags, Mode::empty())?;
    let mut request = InterfaceRequest {
        name: [0; INTERFACE_NAME],
        flags: IFF_TUN | IFF_NO_PI | IFF_VNET_HDR,
        rest: [0; 22],
    };
    // One less: it ends with a zero.
    request.name[..INTERFACE_NAME - 1]
        .get_mut(..interface.len())
        .ok_or(Errno::NAMETOOLONG)?
        .copy_from_slice(interface.as_bytes());
    // SAFETY: TUNSETIFF reads and writes one `struct ifreq` (40 bytes), which this is.
    unsafe { ioctl::ioctl(&file, ioctl::Updater::<TUNSETIFF, _>::new(&mut request)) }?;
    let set = |offloads| {
        // SAFETY: TUNSETOFFLOAD takes a number.
        unsafe { ioctl::ioctl(&file, IntegerSetter::<TUNSETOFFLOAD>::new_usize(offloads)) }
    };
    let datagrams = set(OFFLOADS_UDP).is_ok();
    if !datagrams && let Err(error) = set(OFFLOADS) {
        tracing::debug!(%error, "the interface gives packets one by one");
    }
    // SAFETY: the descriptor is owned, and stays where it is until the `AsyncFd` is dropped.
    let file = Arc::new(unsafe { AsyncFd::register(file) }.map_err(io::Error::from)?);
    let reader = Reader {
        file: Arc::clone(&file),
        path,
        buffer: vec![0; LARGEST_READ],
        packets: Vec::with_capacity(READS),
    };
    Ok((Writer::new(file, datagrams), reader))
}

/// Reads packets.
pub(super) struct Reader {
    file: Arc<AsyncFd<OwnedFd>>,
    path: Arc<PathMtu>,
    buffer: Vec<u8>,
    packets: Vec<Packet<Ip>>,
}

impl Reader {
    /// Reads what there is, up to a bound. Says whether there may be more.
    fn read_all(&mut self, pool: &PacketBufPool) -> io::Result<bool> {
        let largest = largest_packet(self.path.largest_datagram());
        for _ in 0..READS {
            let length = match rustix::io::read(self.file.get_ref(), &mut self.buffer[..]) {
                Ok(length) => length,
                Err(Errno::AGAIN) => return Ok(false),
                Err(Errno::INTR) => continue,
                // What was read before goes on; the error comes again.
                Err(_) if !self.packets.is_empty() => return Ok(true),
                Err(error) => return Err(error.into()),
            };
            let Some((header, packet)) = self.buffer[..length].split_first_chunk_mut() else {
                continue;
            };
            let Some(offload) = Offload::parse(*header) else {
                continue;
            };
            let packets = &mut self.packets;
            segment::cut(packet, offload, largest, |length, fill| {
                if length > LARGEST_PACKET {
                    return;
                }
                let mut out = pool.get();
                out.truncate(length);
                fill(&mut out);
                if let Ok(packet) = out.try_into_ip() {
                    packets.push(packet);
                }
            });
            if self.packets.len() >= READS {
                return Ok(true);
            }
        }
        Ok(true)
    }
}

/// The largest packet that fits into a datagram of that size once it is encrypted.
fn largest_packet(datagram: usize) -> usize {
    datagram.saturating_sub(OVERHEAD) / PADDING * PADDING
}

impl IpRecv for Reader {
    async fn recv<'a>(
        &'a mut self,
        pool: &mut PacketBufPool,
    ) -> io::Result<impl Iterator<Item = Packet<Ip>> + Send + 'a> {
        let file = Arc::clone(&self.file);
        while self.packets.is_empty() {
            let mut guard = file.readable().await?;
            if !self.read_all(pool)? {
                guard.clear_ready();
            }
        }
        Ok(self.packets.drain(..))
    }

    fn mtu(&self) -> MtuWatcher {
        // All that asks is the padding, which must not make a packet larger than the MTU. None is
        // larger than that of our largest, which is a multiple of it.
        MtuWatcher::new(super::MAX_MTU)
    }
}

/// Writes packets, those that follow each other as one.
pub(super) struct Writer {
    shared: Arc<Shared>,
    flusher: tokio::task::JoinHandle<()>,
}

struct Shared {
    file: Arc<AsyncFd<OwnedFd>>,
    pending: Mutex<Pending>,
    /// There is something that nobody has written yet.
    wake: Notify,
}

struct Pending {
    run: Run,
    /// The flusher is on its way.
    woken: bool,
    /// The kernel refused a run: no more of them.
    apart: bool,
}

impl Writer {
    fn new(file: Arc<AsyncFd<OwnedFd>>, datagrams: bool) -> Self {
        let shared = Arc::new(Shared {
            file,
            pending: Mutex::new(Pending {
                run: Run::new(datagrams),
                woken: false,
                apart: false,
            }),
            wake: Notify::new(),
        });
        let flusher = tokio::spawn({
            let shared = Arc::clone(&shared);
            async move {
                loop {
                    shared.wake.notified().await;
                    let mut pending = shared.lock();
                    pending.woken = false;
                    if let Err(error) = shared.flush(&mut pending) {
                        tracing::debug!(%error, "packets could not be written");
                    }
                }
            }
        });
        Self { shared, flusher }
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.flusher.abort();
    }
}

impl Shared {
    fn lock(&self) -> std::sync::MutexGuard<'_, Pending> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn flush(&self, pending: &mut Pending) -> io::Result<()> {
        let several = pending.run.packets() > 1;
        let Some(frame) = pending.run.take() else {
            return Ok(());
        };
        match rustix::io::write(self.file.get_ref(), frame) {
            Ok(_) => Ok(()),
            Err(Errno::INVAL) if several => {
                tracing::warn!("the kernel takes packets one by one only");
                pending.apart = true;
                self.write_apart(frame)
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Writes the packets of a run one by one.
    fn write_apart(&self, frame: &[u8]) -> io::Result<()> {
        let (header, packet) = frame.split_first_chunk().ok_or(Errno::INVAL)?;
        let offload = Offload::parse(*header).ok_or(Errno::INVAL)?;
        let mut written = Ok(());
        segment::cut(&mut packet.to_vec(), offload, usize::MAX, |length, fill| {
            let mut packet = vec![0; length];
            fill(&mut packet);
            let result = self.write(&packet);
            if written.is_ok() {
                written = result;
            }
        });
        written
    }

    fn write(&self, packet: &[u8]) -> io::Result<()> {
        let header = [0; offload::LENGTH];
        let parts = [io::IoSlice::new(&header), io::IoSlice::new(packet)];
        rustix::io::writev(self.file.get_ref(), &parts)?;
        Ok(())
    }
}

impl IpSend for Writer {
    /// Takes a packet. It is written when one comes that does not continue it, or when everything
    /// that waits for its turn has had it: that is as soon as no more packets are there.
    async fn send(&mut self, packet: Packet<Ip>) -> io::Result<()> {
        let packet = packet.into_bytes();
        let mut pending = self.shared.lock();
        if pending.run.add(&packet) {
            return Ok(());
        }
        let flushed = self.shared.flush(&mut pending);
        if pending.apart || !pending.run.begin(&packet) {
            return flushed.and(self.shared.write(&packet));
        }
        if !pending.woken {
            pending.woken = true;
            self.shared.wake.notify_one();
        }
        flushed
    }
}
