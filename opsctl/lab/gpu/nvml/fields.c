/* nvmlDeviceGetFieldValues: each field answers for itself, also whether there is such a thing. */
#include "lab.h"
#include <string.h>

enum value_type { TYPE_UINT = 1, TYPE_ULL = 3, TYPE_INT = 5 };

struct field_value {
    unsigned id, scope;
    long long timestamp_us, latency_us;
    unsigned type;
    int result;
    union {
        double real;
        unsigned word;
        unsigned long long wide;
        int number;
    } value;
};

static int put(struct field_value *field, unsigned long long value) {
    field->type = TYPE_ULL;
    field->value.wide = value;
    return NVML_SUCCESS;
}

static int put_word(struct field_value *field, unsigned value) {
    field->type = TYPE_UINT;
    field->value.wide = value;
    return NVML_SUCCESS;
}

static int put_number(struct field_value *field, int value) {
    field->type = TYPE_INT;
    field->value.wide = 0;
    field->value.number = value;
    return NVML_SUCCESS;
}

/* The ability that a field needs; 0: every GPU has it. */
static uint32_t needed(unsigned id) {
    switch (id) {
    case 1 ... 6: return CAN_ECC;
    case 82: return CAN_MEMORY_SENSOR;
    case 138:
    case 139: return CAN_NVLINK;
    case 142 ... 145: return CAN_ROW_REMAP;
    case 193 ... 194:
    case 196: return CAN_T_LIMIT;
    case 195: return CAN_T_LIMIT | CAN_MEMORY_SENSOR;
    default: return 0;
    }
}

static int answer(nvmlDevice_t device, const struct lab_now *now, struct field_value *field) {
    const struct lab_fixed *fixed = fixed_of(device);
    switch (field->id) {
    case 1:
    case 2: return put_word(field, 1);
    case 3:
    case 5: return put(field, now->ecc_single);
    case 4:
    case 6: return put(field, now->ecc_double);
    case 29:
    case 30: return can(device, CAN_ECC) && !can(device, CAN_ROW_REMAP) ? put(field, 0) : NVML_ERROR_NOT_SUPPORTED;
    case 31: return can(device, CAN_ECC) && !can(device, CAN_ROW_REMAP) ? put_word(field, 0) : NVML_ERROR_NOT_SUPPORTED;
    case 74: return put(field, now->power_cap_ns);
    case 75: return put(field, now->sw_thermal_ns + now->hw_thermal_ns);
    case 76: return put(field, now->sync_boost_ns);
    case 77 ... 79: return put(field, 0);
    case 82: return put_word(field, (unsigned)now->memory_temperature_c);
    case 83: return put(field, now->energy_mj);
    case 91: return put_word(field, fixed->nvlinks);
    case 94: return put_word(field, now->pcie_replays);
    case 138: return put(field, now->nvlink_tx_kib);
    case 139: return put(field, now->nvlink_rx_kib);
    case 142: return put_word(field, now->remapped_correctable);
    case 143: return put_word(field, now->remapped_uncorrectable);
    case 144: return put_word(field, now->remapping_pending);
    case 145: return put_word(field, now->remapping_failed);
    case 185: return put_word(field, now->power_mean_mw);
    case 186: return put_word(field, now->power_mw);
    case 187: return put_word(field, fixed->power_min_mw);
    case 188: return put_word(field, fixed->power_max_mw);
    case 189: return put_word(field, fixed->power_default_mw);
    case 190:
    case 192: return put_word(field, load_word(&settings_of(device)->power_limit_mw));
    case 193: return put_number(field, fixed->max_operating_c - fixed->shutdown_c);
    case 194: return put_number(field, fixed->max_operating_c - fixed->slowdown_c);
    case 195:
    case 196: return put_number(field, 0);
    case 197: return put(field, now->pcie_tx_bytes);
    case 198: return put(field, now->pcie_rx_bytes);
    case 230: return put_word(field, load_word(&gpu_of(device)->recovery_action));
    case 269: return put(field, now->sw_thermal_ns);
    case 270: return put(field, now->hw_thermal_ns);
    case 271: return put(field, now->brake_ns);
    default: return NVML_ERROR_NOT_SUPPORTED;
    }
}

nvmlReturn_t nvmlDeviceGetFieldValues(nvmlDevice_t device, int count, struct field_value *fields) {
    REACH(device);
    NEED(fields);
    struct lab_now now;
    now_of(device, &now);
    for (int index = 0; index < count; index++) {
        struct field_value *field = &fields[index];
        uint32_t ability = needed(field->id);
        field->timestamp_us = (long long)now.time_us;
        field->latency_us = 0;
        field->value.wide = 0;
        bool has = (fixed_of(device)->abilities & ability) == ability && device->mig < 0;
        field->result = has ? answer(device, &now, field) : NVML_ERROR_NOT_SUPPORTED;
    }
    return NVML_SUCCESS;
}
