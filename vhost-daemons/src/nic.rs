//! Differences of NICs: common frontends (QEMU, DPDK) serve the control queue themselves, pass on data queues only,
//! and count those in pairs. A frontend that passes on the control queue as well, after the last pair, is served too.

use ringvm_backends::device::DeviceInfo;
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::VIRTIO_NET_F_CTRL_VQ;

/// The answer to GET_QUEUE_NUM.
pub(crate) fn queue_num(info: &DeviceInfo) -> u64 {
    let queues = info.queue_sizes.len() as u64;
    if info.device_type == VIRTIO_ID_NET { queues / 2 } else { queues }
}

/// The features that the driver has accepted. The frontend may have hidden that there is a control queue.
pub(crate) fn driver_features(info: &DeviceInfo, said: u64) -> u64 {
    let kept = if info.device_type == VIRTIO_ID_NET { info.features & 1 << VIRTIO_NET_F_CTRL_VQ } else { 0 };
    said | kept
}
