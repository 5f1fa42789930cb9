//! Network interfaces of a namespace: only what fencing a container takes.

use neli::consts::socket::NlFamily;

use super::{Body, Channel, Namespace, Request, Result};

/// `RTM_NEWLINK` and `RTM_GETLINK` of `linux/rtnetlink.h`.
const NEW_LINK: u16 = 16;
const GET_LINK: u16 = 18;
/// `IFF_UP` and `IFF_LOOPBACK` of `linux/if.h`.
const UP: u32 = 1;
const LOOPBACK: u32 = 8;
/// The size of `struct ifinfomsg` of `linux/rtnetlink.h`, which holds, after family, padding and a
/// device type, in the machine's byte order: index, flags, and which flags to change.
const INTERFACE: usize = 16;

/// Takes every interface of a namespace down but the loopback, so that nothing leaves it any more.
/// Blocks.
///
/// # Errors
/// When the namespace is gone, or the kernel refuses.
pub fn down(namespace: &Namespace) -> Result<()> {
    let mut channel = namespace.run(|| Channel::open(NlFamily::Route))??;
    let request = Request::new(GET_LINK, Body::new(&[0; INTERFACE]));
    let links = channel.dump(
        "list the interfaces of the container",
        &request,
        |links, message| {
            let field = |at: usize| {
                Some(u32::from_ne_bytes(
                    message.body.get(at..at + 4)?.try_into().ok()?,
                ))
            };
            links.extend(field(4).zip(field(8)));
        },
    )?;
    for (index, flags) in links {
        if flags & LOOPBACK != 0 || flags & UP == 0 {
            continue;
        }
        let mut interface = [0; INTERFACE];
        interface[4..8].copy_from_slice(&index.to_ne_bytes());
        interface[12..16].copy_from_slice(&UP.to_ne_bytes());
        channel.ask(
            "take an interface of the container down",
            Request::new(NEW_LINK, Body::new(&interface)),
        )?;
    }
    Ok(())
}
