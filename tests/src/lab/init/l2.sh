#!/bin/busybox sh
# The guest of the lab: a shell on its serial console, driven by the harness or used by hand.
export PATH=/bin:/sbin HOME=/ TERM=screen PS1='guest# '
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/pts /dev/shm /tmp /run /mnt
mount -t devpts devpts /dev/pts
mount -t tmpfs shm /dev/shm
while read -r module; do insmod "$module" || echo "lab: insmod $module failed"; done < /modules/order
wanted=$(sed -n 's/.*lab\.disks=\([0-9]*\).*/\1/p' /proc/cmdline)
tries=0
until [ "$(ls -d /sys/block/vd* 2>/dev/null | wc -l)" -ge "${wanted:-0}" ] || [ "$tries" -ge 100 ]; do
    sleep 0.1
    tries=$((tries + 1))
done
# lsblk knows a serial from udev's database alone; this is what udev's rule for virtio disks puts there.
mkdir -p /run/udev/data
for disk in /sys/block/vd*; do
    [ -e "$disk/dev" ] && echo "E:ID_SERIAL=$(cat "$disk/serial")" > "/run/udev/data/b$(cat "$disk/dev")"
done
dmesg -n 1
if grep -q lab.shell=hand /proc/cmdline; then
    while :; do setsid cttyhack sh -i; done
fi
# Commands come in as they are and nothing is echoed: the harness looks for its own marks only.
stty raw -echo
echo
echo "ringvm-lab: guest ready"
while IFS= read -r line; do eval "$line"; done
poweroff -f
